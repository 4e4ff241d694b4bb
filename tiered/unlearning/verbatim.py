"""Verbatim memorisation: what a system writes on from the first half of a row, against the rest."""

import numpy as np
import torch
from transformers import PreTrainedModel

from tiered.metrics import token_lcs

LEAST_ROWS = 64  # written on at once: a step for one token a row costs about the same for few


@torch.inference_mode()
def verbatim_overlap(
    model: PreTrainedModel,
    input_ids: np.ndarray,
    batch_rows: int,
    allowed: list[int] | None = None,
) -> np.ndarray:
    """Per row (R,): longest common subsequence of the greedy continuation of tokens 0..T/2 - 1 and
    of tokens T/2..T - 1, on token ids, as a share of their number, in [0, 1].

    allowed: partitions that a tiered model may route to. An end of text does not end a
    continuation: rows are blocks, and what follows is compared all the same.
    """
    ids = torch.from_numpy(np.ascontiguousarray(input_ids, dtype=np.int64))
    given = ids.shape[1] // 2
    wanted = ids.shape[1] - given
    routing = {} if allowed is None else {"allowed_partitions": allowed}
    found = []
    for batch in ids.split(max(batch_rows, LEAST_ROWS)):
        prompt = batch[:, :given].to(model.device)
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            min_new_tokens=wanted,
            max_new_tokens=wanted,
            **routing,
        ).cpu()
        pairs = zip(batch[:, given:].tolist(), written[:, given:].tolist(), strict=True)
        found += [token_lcs(text, other) for text, other in pairs]
    return np.array(found)
