"""Which partition's model predicts a domain best: where domain-adaptive pretraining starts."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tiered.config import Config
from tiered.data import ProcessedData
from tiered.mixtures import cached_prior
from tiered.record import device_of
from tiered.scoring import score_prefixes
from tiered.store import UserError, verify


def nearest_partition(
    config: Config, data: ProcessedData, domain: str, models: Mapping[int, Path]
) -> tuple[int, dict[str, float]]:
    """The partition of greatest cached posterior (DEMix, arXiv:2108.05036, section 5) on validation
    rows of a domain (of equals the one of least loss), and every partition's posterior.

    The evidence of a row is all of its tokens, whatever eval.likelihood says of mixtures: by its
    last token alone Spanish is nearest to Kazakh, whose model predicts it far worse than Italian's.
    models: model folders by partition. UserError if the domain has no validation row.
    """
    rows = data.rows(domain, "validation", config.eval.cached_rows)
    if not rows.document_ids:
        raise UserError(f"domain {domain} has no validation row to choose the nearest model by")
    ids = torch.from_numpy(np.ascontiguousarray(rows.input_ids))
    losses = []
    for folder in models.values():
        verify(folder)
        model = AutoModelForCausalLM.from_pretrained(folder).eval().to(device_of(config))
        losses.append(score_prefixes(model, ids, ids.shape[1] - 1, config.eval.batch_rows)["nll"])
    log_probs = -torch.stack(losses, -1).double()  # (R, S, K)
    prior = cached_prior(log_probs)
    order = sorted(range(len(models)), key=lambda i: (-prior[i].item(), losses[i].sum().item(), i))
    names = list(models)
    posterior = {str(k): round(p, 6) for k, p in zip(names, prior.tolist(), strict=True)}
    return names[order[0]], posterior
