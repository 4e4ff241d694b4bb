"""Contenders of scripts/bench.py that have experts: DEMix, mixing its experts, LoRA experts, the
OLMoE family and its routing recorder."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from tiered.baselines.modeling_demix import DemixConfig, DemixForCausalLM
from tiered.baselines.modeling_lora_experts import LoraExpertsForCausalLM
from tiered.baselines.modeling_moe import MoeConfig, MoeForCausalLM
from tiered.experts import routing_of
from tiered.recorder import RoutingRecorder

LORA_RANK = 16


def shape(size: dict[str, Any]) -> dict[str, Any]:
    """LlamaConfig's arguments: a SwiGLU block of 8/3 of the width, to a multiple of 8."""
    d = size["hidden"]
    return {
        "vocab_size": size["vocab"],
        "hidden_size": d,
        "intermediate_size": 8 * -(-d // 3),
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
    }


def expert_step(kind: str, case: str, size: dict[str, Any]) -> Callable[[], None]:
    """What one turn of a contender does: `demix` a training step with its AdamW update; `mixing`
    and `lora` a forward pass."""
    torch.manual_seed(0)
    device, count = torch.device(size["device"]), size["domains"]
    rows = max(1, size["tokens"] // size["length"])
    ids = torch.randint(1, size["vocab"], (rows, size["length"]), device=device)
    if case == "lora":
        return lora_step(kind, size, ids)
    config = DemixConfig(domain_experts=list(range(count)), **shape(size))
    model = (
        DemixForCausalLM(config)
        if kind != "dense"
        else LlamaForCausalLM(LlamaConfig(**shape(size)))
    )
    model.to(device)
    if case == "demix":
        given = {}
        if kind != "dense":
            if rows % count:
                raise SystemExit(f"bench.py: demix: {rows} rows are no multiple of {count} domains")
            given["domain_ids"] = torch.arange(count, device=device).repeat_interleave(
                rows // count
            )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

        def train() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, labels=ids, **given).loss.backward()
            optimizer.step()

        return train
    model.eval()
    parts = [model.part(k) for k in range(count)]

    @torch.inference_mode()
    def mix() -> None:
        if kind == "ours":
            model.expert_logits(ids, use_cache=False)
            return
        for part in parts if kind == "one by one" else parts[:1]:
            part(ids, use_cache=False)

    return mix


def lora_step(kind: str, size: dict[str, Any], ids: torch.Tensor) -> Callable[[], None]:
    """A forward pass of the base model, or of it with all experts under a routing."""
    base = LlamaForCausalLM(LlamaConfig(**shape(size))).to(ids.device).eval()
    if kind == "base":
        return torch.inference_mode()(lambda: base(ids, use_cache=False))
    count = size["domains"]
    model = LoraExpertsForCausalLM.from_base(
        base, rank=LORA_RANK, scale=1 / 16, experts=list(range(count))
    ).to(ids.device)
    for module in model.routed().values():
        for parameter in (module.a, module.b, module.gates):
            torch.nn.init.normal_(parameter, std=0.02)
    routing = {"ours": "phatgoose"}.get(kind, kind)
    given = {"cosines": torch.rand(*ids.shape, count, device=ids.device)}

    @torch.inference_mode()
    def forward() -> None:
        model(ids, routing=routing, use_cache=False, **given)

    return forward


def mixture_step(kind: str, case: str, size: dict[str, Any]) -> Callable[[], None]:
    """`moe`: a training step with its AdamW update; `recorder`: a forward pass of text that is
    scored, with or without what the recorder keeps of it."""
    torch.manual_seed(0)
    device, experts, used = torch.device(size["device"]), size["experts"], size["topk"]
    rows = max(1, size["tokens"] // size["length"])
    ids = torch.randint(1, size["vocab"], (rows, size["length"]), device=device)
    values = shape(size) | {"num_experts": experts, "num_experts_per_tok": used}
    values["intermediate_size"] = 8 * -(-size["hidden"] // (3 * used))  # of one expert
    values["eos_token_id"] = None
    if kind == "transformers":
        config = OlmoeConfig(**values, output_router_logits=True)
        model = OlmoeForCausalLM(config)
    else:
        model = MoeForCausalLM(MoeConfig(**values))
    if kind == "eager experts":
        model.set_experts_implementation("eager")
    model.to(device)
    if case == "recorder":
        model.eval()
        recorder = RoutingRecorder("a", size["vocab"])

        @torch.inference_mode()
        def read() -> None:
            if kind == "ours":
                recorder.add("a", ids.cpu(), routing_of(model, ids))
            else:
                model(ids, output_routing=True, logits_to_keep=1)

        return read
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return train
