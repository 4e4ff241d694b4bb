"""Domain tokens (the `+domain-token` baseline of DEMix, arXiv:2108.05036): a Llama that reads a
token of its domain before every row; everything else is shared by all domains.

The token is no part of the vocabulary: it is never predicted, and what it predicts (the first token
of a row) is left out, so that logits stand for the same tokens as without it.

Shapes: B batch, T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, LlamaConfig, LlamaForCausalLM
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast


@strict
class DomainTokenConfig(LlamaConfig):
    """Configuration of a Llama with domain tokens; domains: indices of the tokens that there
    are."""

    model_type = "domain_token"
    domains: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.domains = sorted(self.domains or [0])
        super().__post_init__(**kwargs)


class DomainTokenForCausalLM(LlamaForCausalLM):
    """Llama whose every row begins with the token of `domain_ids` (not needed where there is but
    one)."""

    config_class = DomainTokenConfig
    config: DomainTokenConfig

    def __init__(self, config: DomainTokenConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        tokens = {str(k): nn.Parameter(torch.zeros(size)) for k in config.domains}
        self.domain_tokens = nn.ParameterDict(tokens)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.ParameterDict):
            for token in module.values():
                init.normal_(token, mean=0.0, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits (B, T, V), or of the last logits_to_keep tokens; loss in nats if
        labelled. domain_ids (B,): the token before each row; ValueError if it is not there."""
        begins = past_key_values is None or past_key_values.get_seq_length() == 0
        states = self.model.embed_tokens(input_ids)
        positions = None
        if begins:
            states = torch.cat([self._tokens(domain_ids, len(states))[:, None], states], 1)
        if attention_mask is not None:
            # the token is seen by all, and next to the first token wherever padding stands
            attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)
            positions = (attention_mask.long().cumsum(-1) - 1)[:, -states.shape[1] :]
        out = self.model(
            inputs_embeds=states,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        states = out.last_hidden_state[:, 1:] if begins else out.last_hidden_state
        logits = self.lm_head(states[:, -logits_to_keep:] if logits_to_keep else states)
        loss = None
        if labels is not None:
            wanted = {n: v for n, v in kwargs.items() if n == "num_items_in_batch"}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **wanted)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def _tokens(self, domain_ids: torch.Tensor | None, rows: int) -> torch.Tensor:
        """The domain token (B, D) of every row."""
        if domain_ids is None:
            if len(self.config.domains) > 1:
                raise ValueError(f"domain_ids: which of {self.config.domains} is each row's?")
            return self.domain_tokens[str(self.config.domains[0])].expand(rows, -1)
        missing = sorted(set(domain_ids.tolist()) - set(self.config.domains))
        if missing:
            raise ValueError(f"domain {missing[0]} is not there (present: {self.config.domains})")
        return torch.stack([self.domain_tokens[str(k)] for k in domain_ids.tolist()])

    # --- one domain's share ------------------------------------------------------------------

    def remove_part(self, k: int) -> None:
        """Delete a domain's token; removing it again is a no-op. ValueError for the last."""
        if k not in self.config.domains:
            return
        if len(self.config.domains) == 1:
            raise ValueError("removing the last domain would leave no model")
        del self.domain_tokens[str(k)]
        self.config.domains = [i for i in self.config.domains if i != k]

    def part_parameters(self, k: int) -> Iterator[nn.Parameter]:
        """What is one domain's alone: its token."""
        yield self.domain_tokens[str(k)]

    def part(self, k: int) -> "DomainTokenForCausalLM":
        """The model of one domain: the same tensors, no copies."""
        values = {
            n: v for n, v in self.config.to_dict().items() if n not in ("domains", "model_type")
        }
        config = DomainTokenConfig(domains=[k], **values)
        config._attn_implementation = self.config._attn_implementation
        with torch.device("meta"):
            model = DomainTokenForCausalLM(config)
        model.model, model.lm_head = self.model, self.lm_head
        model.domain_tokens = nn.ParameterDict({str(k): self.domain_tokens[str(k)]})
        return model.train(self.training)


AutoConfig.register(DomainTokenConfig.model_type, DomainTokenConfig, exist_ok=True)
AutoModelForCausalLM.register(DomainTokenConfig, DomainTokenForCausalLM, exist_ok=True)
# save_pretrained copies this file beside the weights, so that a checkpoint loads anywhere.
DomainTokenConfig.register_for_auto_class()
DomainTokenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
