"""Run llama.cpp's converter with a name for a way of cutting text that it knows, under a vocabulary that it does not.

    python named_pre.py NAME convert_hf_to_gguf.py ARGUMENTS

Its converter has no option for that: it looks up the tokens of one fixed text in a list of published tokenizers, and
stops where they are not in it. That lookup comes first here too; the name is used only where it finds nothing.
"""

import importlib
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    name, script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *arguments]
    converter = importlib.import_module(Path(script).stem)
    model = sys.modules[converter.ModelBase.__module__].TextModel  # the module itself in llama.cpp before mid 2026
    look_up = model.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(look_up(self, tokenizer))
        except NotImplementedError:
            return name

    model.get_vocab_base_pre = named
    converter.main()


if __name__ == "__main__":
    main()
