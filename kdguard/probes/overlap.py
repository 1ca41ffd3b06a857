"""Overlap: how alike a question is to others for a model, where it reads them and where it answers them.

What lies near the new is what is forgotten ("localised interference", arXiv 2604.15574).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kdguard.model.memory import in_batches

ROWS = 16  # prompts at once


@torch.no_grad()
def states(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """(prompts, 2, hidden), in fp32 on the CPU: the mean over a prompt's tokens in the middle layer, and the last
    layer's state at its last token, from which the answer starts.
    """
    decoder, middle = model.get_decoder(), model.config.get_text_config().num_hidden_layers // 2
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

    def looked_at(batch: list[int]) -> tuple[list[int], Tensor]:
        lengths = torch.tensor([len(prompts[i]) for i in batch], device=model.device)
        ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long, device=model.device)
        for row, i in enumerate(batch):
            ids[row, : len(prompts[i])] = torch.tensor(prompts[i])
        mask = (torch.arange(ids.shape[1], device=model.device) < lengths[:, None]).long()  # (rows, tokens)
        layers = decoder(ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
        read = (layers[middle].float() * mask[..., None]).sum(1) / lengths[:, None]
        answers = layers[-1][torch.arange(len(batch), device=model.device), lengths - 1].float()
        return batch, torch.stack([read, answers], 1).cpu()

    found = torch.empty(len(prompts), 2, model.config.get_text_config().hidden_size)
    done = 0
    progress(done, len(order))
    for batch, both in in_batches(model, order, lambda i: len(prompts[i]), looked_at, most=ROWS):
        found[batch] = both
        done += len(batch)
        progress(done, len(order))
    return found


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """(old, 2, hidden), (new, 2, hidden) -> (old, new): the mean of both states' cosines, -1 to 1.

    What all prompts have in common is taken out first: language models' states point mostly one way.
    """
    common = torch.cat([old, new]).mean(0)
    old, new = (torch.nn.functional.normalize(each - common, dim=-1) for each in (old, new))
    return torch.einsum("ikh,jkh->ij", old, new) / 2


def moved(before: Tensor, after: Tensor) -> Tensor:
    """(prompts, 2, hidden) twice -> (prompts,): 1 - cosine of the middle layer's states before and after."""
    return 1 - torch.cosine_similarity(before[:, 0], after[:, 0], dim=-1)
