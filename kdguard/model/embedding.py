"""The table of input embeddings in the computer's memory: a GPU need not hold what is only looked up."""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class LookedUp(nn.Module):
    """An embedding whose table stays where it is, (vocabulary, hidden), while what is looked up goes to the ids."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.weight = table  # no parameter: where a model's parameters are is where it computes

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)


def free_embeddings(model: PreTrainedModel) -> int:
    """Move the table of input embeddings into the computer's memory; the bytes of the GPU's that are freed.

    0 where the output head shares the table, and where the embedding does more than look up.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or embedding.weight is head.weight:
        return 0
    table = embedding.weight.data
    model.set_input_embeddings(LookedUp(table.to("cpu")))
    return table.nbytes
