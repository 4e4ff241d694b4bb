"""LoRA experts on a frozen seed LM, trained apart with peft: one adapter per partition, then one
gate vector per linear map (PHATGOOSE, arXiv:2402.05859).

A partition's folder holds its expert twice: merged into the seed LM, a plain checkpoint that
routing, removal and attacks treat as any other model's; and as `adapter/` (peft's files, and
vectors.safetensors with the gates and mean activations), from which `load_experts` makes the model
that routes inside.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiered import branching
from tiered.baselines.modeling_lora_experts import LoraExpertsForCausalLM, linear_names
from tiered.config import Config
from tiered.fitting import Fit, OrderedBlocks, fit, is_trained
from tiered.methods import plain_card
from tiered.store import TIMINGS, digest, read_json, seed_of, verify

ADAPTER, VECTORS = "adapter", "vectors.safetensors"
MEAN_ROWS = 64  # training blocks whose activations are averaged


def adapter_config(config: Config, base: PreTrainedModel) -> LoraConfig:
    """peft's configuration: every linear map of the layers, B = 0 at the start."""
    section = config.model
    return LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules=linear_names(base),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def train_expert(
    config: Config,
    job: Fit,
    start: Path,
    ordered: OrderedBlocks,
    copy_tokenizer: Callable[[Path], None],
) -> None:
    """Train the adapter of a partition on its blocks in order, then its gates, and publish both.

    job: of the partition's model; start: the seed LM's folder.
    """
    adapter, blocks = _train_adapter(config, job, start, ordered), ordered.blocks
    section, record = config.model, read_json(adapter / "record.json")
    rows = config.training.gradient_accumulation_steps
    rows *= job.arguments["per_device_train_batch_size"]
    job.earlier_seconds = read_json(adapter / TIMINGS)["seconds"]
    job.arguments = {**job.arguments, "learning_rate": section.lora_gate_learning_rate}
    passes = section.lora_gate_steps * rows / len(blocks)
    gated = OrderedBlocks(blocks, passes, seed_of(job.seed, "gates"), ordered.separator)

    def make() -> PreTrainedModel:
        return gate_model(start, adapter)

    def finish(model: LoraExpertsForCausalLM, path: Path) -> dict[str, Any]:
        vectors = gates_and_averages(model, ordered)
        _replace_checkpoint(path, start, adapter)
        copy_tokenizer(path)
        save_file(vectors, path / ADAPTER / VECTORS, metadata={"format": "pt"})
        merged = AutoModelForCausalLM.from_pretrained(path)
        own = sum(
            w.numel() for w in load_file(path / ADAPTER / "adapter_model.safetensors").values()
        )
        gates = sum(v.numel() for n, v in vectors.items() if n.startswith("gates."))
        return {
            "parameters": {**plain_card(merged, blocks), "own": own + gates},
            "optimizer_steps": record["optimizer_steps"],
            "gate_steps": section.lora_gate_steps,
            "final_training_loss_nats": record["final_training_loss_nats"],
            "tokens": record["tokens"] + len(gated) * blocks.shape[1],
        }

    fit(config, job, make, gated, finish)


def _train_adapter(config: Config, job: Fit, start: Path, ordered: OrderedBlocks) -> Path:
    """Folder of the adapter alone in the store, trained if it is not there yet."""
    # everything that decides it is in the model's own address
    folder = config.store_dir / "adapters" / digest([job.folder.name, "adapter"])
    if not config.overwrite and is_trained(folder):
        verify(folder)
        return folder
    own = Fit(folder, f"{job.label} adapter", job.seed, dict(job.arguments))

    def make() -> PreTrainedModel:
        base = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        branching.add_dropout(base, config.training.dropout)
        return get_peft_model(base, adapter_config(config, base))

    def finish(model: PeftModel, path: Path) -> dict[str, Any]:
        (path / "README.md").unlink(missing_ok=True)
        settings = read_json(path / "adapter_config.json")
        # neither where the base lies nor the order of a set may reach the content's hash
        settings["base_model_name_or_path"] = ""
        settings["target_modules"] = sorted(settings["target_modules"])
        text = json.dumps(settings, indent=1, sort_keys=True)
        (path / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        return {}

    fit(config, own, make, ordered, finish)
    return folder


def adapter_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Per linear map a (r, I) and b (O, r) of an adapter, and its gates and averages (I,) if there
    are any yet."""
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        module, _, part = name.removesuffix(".weight").rpartition(".lora_")
        tensors.setdefault(module.removeprefix("base_model.model."), {})[part.lower()] = value
    if (folder / VECTORS).is_file():
        for name, value in load_file(folder / VECTORS).items():
            kind, _, module = name.partition(".")
            tensors[module][kind] = value
    return tensors


def load_experts(base: Path, models: Mapping[int, Path], **settings: Any) -> LoraExpertsForCausalLM:
    """The model of all experts, routed inside. models: partition folders by index; settings: fields
    of LoraExpertsConfig."""
    first = read_json(next(iter(models.values())) / ADAPTER / "adapter_config.json")
    rank, alpha = first["r"], first["lora_alpha"]
    seed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = LoraExpertsForCausalLM.from_base(seed, rank=rank, scale=alpha / rank, **settings)
    for k, folder in sorted(models.items()):
        verify(folder)
        model.add_expert(k, adapter_tensors(folder / ADAPTER))
    return model.eval()


def gate_model(base: Path, adapter: Path) -> LoraExpertsForCausalLM:
    """One expert that its gates let through in part: W u + sigmoid(v . u) scale B A u. Only the
    gates v are trained; they begin at 0."""
    settings = read_json(adapter / "adapter_config.json")
    seed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    scale = settings["lora_alpha"] / settings["r"]
    model = LoraExpertsForCausalLM.from_base(
        seed, rank=settings["r"], scale=scale, routing="gate", experts=[]
    )
    model.add_expert(0, adapter_tensors(adapter))
    gates = {id(m.gates) for m in model.routed().values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in gates)
    return model


@torch.no_grad()
def gates_and_averages(
    model: LoraExpertsForCausalLM, ordered: OrderedBlocks
) -> dict[str, torch.Tensor]:
    """`gates.<module>` and `averages.<module>` (I,) of the one expert of a model: what was trained,
    and the mean of its training tokens' activations, each of length 1, with the expert at work.

    Of MEAN_ROWS rows at even distances in training order, so of all its domains.
    """
    routed, sums, tokens, hooks = model.routed(), {}, 0, []

    def record(name: str):
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            unit = torch.nn.functional.normalize(inputs[0].double(), dim=-1)
            sums[name] = sums.get(name, 0) + unit.sum((0, 1))

        return hook

    for name, module in routed.items():
        hooks.append(module.register_forward_pre_hook(record(name)))
    chosen = np.unique(np.linspace(0, len(ordered) - 1, MEAN_ROWS).round().astype(int))
    expert = torch.zeros(1, dtype=torch.long, device=model.device)
    for i in chosen.tolist():
        row = {n: v[None].to(model.device) for n, v in ordered[i].items() if n != "labels"}
        model(**row, routing="oracle", expert=expert, use_cache=False)
        tokens += row["input_ids"].numel()
    for hook in hooks:
        hook.remove()
    gates = {f"gates.{n}": m.gates[0].detach().cpu().clone() for n, m in routed.items()}
    return gates | {f"averages.{n}": (s / tokens).float().cpu() for n, s in sums.items()}


def _replace_checkpoint(path: Path, base: Path, adapter: Path) -> None:
    """Put the merged model and the adapter in the place of what training saved."""
    log = path / "metrics.jsonl"
    log.rename(path / "gate_metrics.jsonl")
    for file in path.iterdir():
        if file.name != "gate_metrics.jsonl":
            file.unlink()
    shutil.copy(adapter / "metrics.jsonl", path)
    (path / ADAPTER).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, path / ADAPTER)
    seed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(seed, adapter).merge_and_unload().save_pretrained(path)
