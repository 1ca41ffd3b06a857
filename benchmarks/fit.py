"""How long a row may be on which card, by `kdguard fit`, beside what others publish: `python benchmarks/fit.py`.

Llama 3.1 8B in 4-bit, rank 32, the setting of Unsloth's published table, with the guard on; and torchtune's published
peak in its own setting. These are estimates: no GPU is needed, and none is measured. Writes `results/fit.json`.
"""

from report import write

from kdguard.card import SIZES, of_size
from kdguard.config import TuneConfig, presets, resolve
from kdguard.fit import config_of, estimate, longest

PRESET = "llama3.1-8b"
TORCHTUNE = {"rank": 8, "micro_batch_size": 2, "max_length": 2048, "guard": False, "embeddings": "gpu"}


def main() -> None:
    def made(**flags: object) -> TuneConfig:
        return resolve({"model": presets()[PRESET]["model"], "rank": 32, **flags})

    rooms = [of_size(size).room * 2**30 for size in SIZES]
    lengths = {
        name: longest(made(offload=offload), config_of(made()), rooms, gpu=True)
        for name, offload in (("guarded", False), ("guarded, --offload", True))
    }
    theirs = made(**TORCHTUNE)
    needs = estimate(theirs, config_of(theirs), theirs.max_length, gpu=True).total / 2**30
    results = {
        "longest": [
            {"gb": size, **{name: found[i] for name, found in lengths.items()}} for i, size in enumerate(SIZES)
        ],
        "torchtune_gib": round(needs, 3),
    }
    write("fit", results)
    print(results)


if __name__ == "__main__":
    main()
