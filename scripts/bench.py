"""Speed and memory of the models, as ratios measured side by side in one run.

Every contender lives in a process of its own (its peak memory is its own); they take turns, one
step each per round, and the median over the rounds is compared with ours. Only those of `recorder`
share one: what two processes differ by, of equal work, is as much as the tenth that is asked there.
The matrix products that no implementation can avoid take part as a contender: the floor.

    python scripts/bench.py train-step --hidden 196 --experts 32 --vocab 119547
    python scripts/bench.py train-step --vocab 8192 --reference FILE.py --reference-python PYTHON
    python scripts/bench.py generate --batch 16
    python scripts/bench.py memory --tokens 1024 4096 16384
    python scripts/bench.py routing --config configs/quickstart/n16.yaml    # a trained run
    python scripts/bench.py systems --config configs/cbtm/k01.yaml configs/cbtm/k16.yaml
    python scripts/bench.py attacks --length 128 --tokens 128000 --vocab 4096    # 1,000 rows
    python scripts/bench.py clusters --vectors 10000 100000 1000000
    python scripts/bench.py demix --domains 16 --hidden 512 --heads 8 --tokens 4096
    python scripts/bench.py mixing --domains 16 --hidden 512 --heads 8
    python scripts/bench.py lora --domains 16 --hidden 512 --heads 8
    python scripts/bench.py moe --experts 64 --topk 8 --hidden 256 --heads 8 --layers 4
    python scripts/bench.py data --megabytes 100 2000    # seconds grow with the input, memory not
    python scripts/bench.py recorder --experts 64 --topk 8 --hidden 256 --heads 8 --layers 4
    python scripts/bench.py scaling --path route --partitions 1 16 1024 --hidden 256 --vocab 32768

--reference names any file that offers MonetConfig and MonetForCausalLM; it may run in another
interpreter, whose libraries differ from ours.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "train-step": ("ours", "plain loss", "compiled", "products", "llama", "olmoe"),
    "eval": ("ours", "compiled", "llama", "olmoe"),
    "generate": ("ours", "compiled", "llama"),
    "purge": ("ours", "masked"),
    "memory": ("ours", "plain loss"),
    "routing": ("ours", "one model", "all models"),
    "systems": (),  # the runs of --config, the first of which the others are compared with
    "clusters": ("ours", "scikit-learn"),
    "attacks": ("ours", "loss only", "log-softmax"),
    "demix": ("ours", "dense"),
    "mixing": ("ours", "one by one", "one model"),
    "lora": ("ours", "glider", "arrow", "base"),
    "moe": ("ours", "transformers", "eager experts"),
    "recorder": ("ours", "forward"),
    "data": ("ours", "run_clm", "tokenizer alone"),
    "scaling": (),  # the numbers of --partitions, the first of which the others are compared with
}
ONE_PROCESS = ("recorder",)  # cases whose contenders share a process, and so its peak memory
OLMOE_EXPERTS, OLMOE_ACTIVE = 64, 8


# ---------------------------------------------------------------- one contender, in its process


def build_model(kind: str, size: dict[str, Any]) -> Any:
    """The model of a contender, on its device."""
    import torch

    torch.manual_seed(0)
    if kind == "reference":
        spec = importlib.util.spec_from_file_location("reference_monet", size["reference"])
        module = importlib.util.module_from_spec(spec)
        sys.modules["reference_monet"] = module
        spec.loader.exec_module(module)
        config = module.MonetConfig(**monet_sizes(size), pad_token_id=0)
        config._attn_implementation = "sdpa"
        model = module.MonetForCausalLM(config)
    else:
        sys.path.insert(0, str(ROOT))
        from modeling_monet import MonetConfig, MonetForCausalLM

        config = MonetConfig(**monet_sizes(size), pad_token_id=0)
        counts = config.parameter_counts()
        if kind in ("llama", "olmoe"):
            model = rival(kind, size, counts["non_embedding"])
        else:
            model = MonetForCausalLM(config)
        if kind == "masked":
            experts = torch.rand(config.num_routers, config.moe_experts, config.moe_experts)
            model.purge_experts(experts > 0.1)
    return model.to(device_of(size))


def device_of(size: dict[str, Any]) -> Any:
    """cuda when present and wanted, else cpu."""
    import torch

    return torch.device(size["device"])


def monet_sizes(size: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments that ours and a reference share."""
    return {
        "vocab_size": size["vocab"],
        "hidden_size": size["hidden"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "max_position_embeddings": 4096,
        "moe_dim": size["moe_dim"],
        "moe_heads": size["moe_heads"],
        "moe_experts": size["experts"],
        "moe_topk": size["topk"],
        "moe_groups": size["groups"],
        "moe_decompose": size["decompose"],
    }


def rival(kind: str, size: dict[str, Any], budget: int) -> Any:
    """A Llama of `budget` non-embedding parameters, or an OLMoE that computes as many per token."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

    d, layers = size["hidden"], size["layers"]
    # they want heads that divide the width: as many as ours, or the nearest fewer
    heads = next(h for h in range(size["heads"], 0, -1) if d % h == 0 and d // h % 2 == 0)
    rest = budget - layers * (4 * d * d + 2 * d) - d
    shared = {
        "vocab_size": size["vocab"],
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "llama":
        inner = max(1, round(rest / (layers * 3 * d)))
        return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=inner))
    # a multiple of 4: its grouped product wants strides of 16 bytes
    inner = (rest - layers * d * OLMOE_EXPERTS) / (layers * OLMOE_ACTIVE * 3 * d)
    inner = max(4, 4 * round(inner / 4))
    moe = {"num_experts": OLMOE_EXPERTS, "num_experts_per_tok": OLMOE_ACTIVE}
    return OlmoeForCausalLM(OlmoeConfig(**shared, **moe, intermediate_size=inner))


def make_step(kind: str, case: str, size: dict[str, Any]) -> Callable[[], None]:
    """What one turn of a contender does."""
    import torch

    if kind == "products":
        return products_step(size)
    if case == "routing":
        return routing_step(kind, size, size["config"][0])
    if case == "systems":
        return routing_step("ours", size, kind)
    if case == "clusters":
        return clusters_step(kind, size)
    if case in ("demix", "mixing", "lora"):
        sys.path.insert(0, str(ROOT))
        from bench_experts import expert_step

        return expert_step(kind, case, size)
    if case == "scaling":
        sys.path.insert(0, str(ROOT))
        from bench_scaling import scaling_step

        return scaling_step(kind, size)
    if case in ("moe", "recorder"):
        sys.path.insert(0, str(ROOT))
        from bench_experts import mixture_step

        return mixture_step(kind, case, size)
    model = build_model(kind, size)
    rows = max(1, size["tokens"] // size["length"])
    ids = torch.randint(1, size["vocab"], (rows, size["length"]), device=device_of(size))
    if case in ("train-step", "memory"):
        model.train()
        run = torch.compile(model) if kind == "compiled" else model
        options = {"output_logits": True} if kind == "plain loss" else {}

        def train() -> None:
            model.zero_grad(set_to_none=True)
            loss = run(input_ids=ids, labels=None if options else ids, **options)
            if options:  # all logits, and cross-entropy on them
                logits = loss.logits[:, :-1].flatten(0, 1)
                torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
            else:
                loss.loss.backward()

        return train
    model.eval()
    if case == "attacks":
        return attacks_step(kind, model, ids)
    if case == "generate":
        prompt = ids[:1].expand(size["batch"], -1)[:, : size["prompt"]].contiguous()
        mask = torch.ones_like(prompt)
        new = size["new_tokens"]
        options = compile_options() if kind == "compiled" else {}

        @torch.inference_mode()
        def generate() -> None:
            model.generate(
                prompt,
                attention_mask=mask,
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **options,
            )

        return generate

    run = torch.compile(model) if kind == "compiled" else model

    @torch.inference_mode()
    def forward() -> None:
        # purge: what masks cost, the head apart
        run(input_ids=ids, **({"logits_to_keep": 1} if case == "purge" else {}))

    return forward


def compile_options() -> dict[str, Any]:
    """Arguments of generate for a compiled step, which wants a cache of fixed shape."""
    from transformers import CompileConfig

    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # transformers compiles by itself only on accelerators
    return {"cache_implementation": "static", "compile_config": compiled}


def routing_step(kind: str, size: dict[str, Any], config: str) -> Callable[[], None]:
    """Scores of a config's run on test rows: routed token by token (router included), by one of
    its models, by all of them."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    from tiered.config import load
    from tiered.data import ProcessedData
    from tiered.evaluation import router_scores
    from tiered.modeling_tiered import assign
    from tiered.partition import make_partition_map
    from tiered.router import load_models, load_router, run_models, tiered_model
    from tiered.scoring import score_rows

    config = load(config)
    data, partitions = ProcessedData(config), make_partition_map(config)
    router = load_router(config.run_dir / "router", "python train_det_router.py CONFIG")
    model = tiered_model(
        config, partitions, router, load_models(run_models(config, partitions, data))
    )
    rows = [data.rows(d, config.eval.split, size["rows"]).input_ids for d in data.domains]
    batch_rows = config.eval.batch_rows

    ids = np.concatenate(rows)
    shape = (len(ids), ids.shape[1] - 1)

    def step() -> None:
        if kind == "ours":
            chosen = {"token": assign(router_scores(model, ids, batch_rows), "token", 1)}
        else:
            used = model.present if kind == "all models" else model.present[:1]
            chosen = {str(k): torch.full(shape, k) for k in used}
        score_rows(model, ids, chosen, batch_rows)

    return step


def attacks_step(kind: str, model: Any, ids: Any) -> Callable[[], None]:
    """Row scores of every forward-only attack; the loss alone; a pass that takes log-softmax of
    all logits and keeps the targets' entries."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    from tiered.scoring import TokenScores, score_prefixes
    from tiered.unlearning.attacks import row_statistics

    length, batch_rows = ids.shape[1] - 1, 16

    def ours() -> None:
        found = {
            n: v.numpy() for n, v in score_prefixes(model, ids, length, batch_rows, True).items()
        }
        tokens = TokenScores(scored=np.ones(found["nll"].shape, dtype=bool), **found)
        row_statistics(tokens, 0.2)

    @torch.inference_mode()
    def plain() -> None:
        for batch in ids.split(batch_rows):
            log_probs = (
                model(input_ids=batch[:, :-1], use_cache=False).logits.float().log_softmax(-1)
            )
            log_probs.gather(-1, batch[:, 1:, None]).mean(1)

    steps = {"ours": ours, "log-softmax": plain}
    return steps.get(kind, lambda: score_prefixes(model, ids, length, batch_rows))


def clusters_step(kind: str, size: dict[str, Any]) -> Callable[[], None]:
    """Clusters of vectors of dimension 100 in 16 equal groups; the inertia goes to stderr."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from sklearn.cluster import KMeans

    from tiered.kmeans import balanced_kmeans

    n, k = size["tokens"], 16
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(k, 100)).astype(np.float32)
    vectors = np.empty((n, 100), dtype=np.float32)
    for i in range(0, n, 10_000):  # float64 noise of all of them would be the peak memory
        part = np.arange(i, min(i + 10_000, n))
        vectors[part] = centres[part % k] + 1.2 * generator.normal(size=(len(part), 100))

    def step() -> None:
        if kind == "ours":
            fit = balanced_kmeans(vectors, k, 0)
            inertia, labels = fit.inertia, fit.labels
        else:
            fit = KMeans(k, n_init=4, random_state=0).fit(vectors)
            inertia, labels = fit.inertia_, fit.labels_
        sizes = np.bincount(labels, minlength=k)
        print(f"{kind}: inertia {inertia:.1f}, sizes {sizes.min()}-{sizes.max()}", file=sys.stderr)

    return step


def products_step(size: dict[str, Any]) -> Callable[[], None]:
    """The matrix products of a training step alone: linear maps (forward and both gradients), as
    few and as large as the algebra allows, and attention's two products per head."""
    import torch

    d, e, tokens = size["hidden"], size["experts"], size["tokens"]
    width, k = size["heads"] * (d // size["heads"]), size["moe_dim"] // 2
    layers, routers = size["layers"], -(-size["layers"] // size["groups"])
    vertical = size["decompose"] == "vertical"
    first = 2 * e * k  # both axes of VD, or HD's one
    shapes = [(d, 3 * width)] * layers + [(width, d)] * layers + [(d, first)] * layers
    halves = (first + e, d // 2)  # [v11 v12 b1] and [v21 v22 b2]
    shapes += [halves] * (2 * layers) if vertical else [(first + e, d)] * layers
    shapes += [(d, 2 * size["moe_heads"] * e)] * routers + [(d, size["vocab"])]
    device = device_of(size)
    inputs = {n: torch.randn(tokens, n, device=device) for s in shapes for n in s if n < 2**15}
    weights = {s: torch.randn(s[1], s[0], device=device) for s in set(shapes)}
    rows, length, heads = tokens // size["length"], size["length"], size["heads"]
    head = torch.randn(rows * heads, length, d // heads, device=device)
    some = max(1, 2**18 // length**2)  # heads whose scores stay in the cache
    square = torch.randn(some, length, length, device=device)

    def linear(shape: tuple[int, int]) -> None:
        x, w = inputs[shape[0]], weights[shape]
        # a wide output is made in slices: kept whole it would cost memory, not products
        for part in w.split(2**14):
            y = x @ part.T
            y @ part
            y.T @ x

    def step() -> None:
        for shape in shapes:
            linear(shape)
        for _ in range(layers):
            for part in head.split(some):
                for _ in range(3):  # scores and values, each with two gradients
                    torch.bmm(part, part.transpose(1, 2), out=square[: len(part)])
                    square[: len(part)] @ part

    return step


def worker(kinds: list[str], case: str, size: dict[str, Any]) -> None:
    """Answer each line on stdin, a contender's name, with the seconds of one turn of it and the
    peak memory so far."""
    import torch

    torch.set_num_threads(size["threads"])
    steps = {kind: make_step(kind, case, size) for kind in kinds}
    cuda = size["device"] == "cuda"
    start = resident_bytes()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        step = steps[line.rstrip("\n")]
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if cuda:
            peak, start = torch.cuda.max_memory_allocated(), 0
        answer = {"seconds": seconds, "peak": peak, "over_start": peak - start}
        print(json.dumps(answer), flush=True)


def resident_bytes() -> int:
    """Resident set of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- the race


class Worker:
    """A process in which contenders take their turns when told to."""

    def __init__(self, kinds: list[str], case: str, size: dict[str, Any], python: str) -> None:
        given = [json.dumps(kinds), case, json.dumps(size)]
        environment = {
            # as scripts/environment.sh sets them for the pipeline
            "MALLOC_MMAP_THRESHOLD_": "33554432",
            "MALLOC_TRIM_THRESHOLD_": "2000000000",
            "MALLOC_TOP_PAD_": "134217728",
            "HF_HUB_OFFLINE": "1",
            **os.environ,
        }
        self.kinds = kinds
        self.answers: dict[str, list[dict]] = {kind: [] for kind in kinds}
        self.process = subprocess.Popen(
            [python, str(Path(__file__).resolve()), "--worker", *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        names = ", ".join(map(repr, self.kinds))
        raise SystemExit(f"bench.py: contender {names} died (see its error above)")

    def turn(self, kind: str) -> None:
        """One step of a contender, noted."""
        self.process.stdin.write(f"{kind}\n")
        self.process.stdin.flush()
        self.answers[kind].append(self._read())

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def race(case: str, kinds: list[str], size: dict[str, Any], rounds: int, python: str) -> list[dict]:
    """Median seconds and peak memory per contender; ratios are theirs over ours."""
    reference = {"reference": python}
    together = [kinds] if case in ONE_PROCESS else [[kind] for kind in kinds]
    processes = [Worker(k, case, size, reference.get(k[0], sys.executable)) for k in together]
    for _ in range(rounds + 1):
        for process in processes:
            for kind in process.kinds:
                process.turn(kind)
    rows = []
    for process in processes:
        process.close()
    for kind, found in (pair for process in processes for pair in process.answers.items()):
        seconds = [a["seconds"] for a in found[1:]]  # the first turn warms up
        rows.append(
            {
                "contender": kind,
                "seconds": statistics.median(seconds),
                "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
                "peak_bytes": found[-1]["peak"],
                "peak_over_start_bytes": found[-1]["over_start"],
            }
        )
    for row in rows:
        row["time_ratio"] = row["seconds"] / rows[0]["seconds"]
        row["memory_ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows


def print_rows(title: str, rows: list[dict], made: int) -> None:
    """A Markdown table: seconds, ratio to the first, what was made per second (0: not counted),
    memory."""
    print(f"\n{title}\n")
    first = "ours" if rows[0]["contender"] == "ours" else "first"
    header = f"| contender | ms | time / {first} | per s | spread | peak GB | peak / {first} |"
    print(header)
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rate = f"{made / row['seconds']:,.0f}" if made else ""
        print(
            f"| {row['contender']} | {1e3 * row['seconds']:.1f} | {row['time_ratio']:.2f} |"
            f" {rate} | {row['spread']:.0%} |"
            f" {row['peak_bytes'] / 1e9:.2f} | {row['memory_ratio']:.2f} |"
        )


def title_of(given: argparse.Namespace, tokens: int) -> tuple[str, int]:
    """What a race was about, and how many tokens (clusters: vectors) one turn handles (0: as many
    as the run has)."""
    if given.case == "clusters":
        return f"clusters: {tokens:,} vectors", tokens
    if given.case in ("routing", "systems"):
        return f"{given.case}: {' '.join(given.config)}, {given.rows} rows per domain", 0
    if given.case == "scaling":
        kind = {"documents": "documents", "clusters": "vectors"}.get(given.path, "tokens")
        return f"scaling, {given.path}: {tokens:,} {kind}, by number of partitions", tokens
    made = given.batch * given.new_tokens if given.case == "generate" else tokens
    shared = given.case in ("demix", "mixing", "lora")
    count = given.domains if shared else given.experts
    size = f"hidden {given.hidden}, {count} experts, vocabulary {given.vocab:,}"
    return f"{given.case}: {made:,} tokens, {size}", made


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    sizes = {"hidden": 196, "experts": 32, "vocab": 8192, "layers": 8, "heads": 32, "length": 256}
    sizes |= {"domains": 16, "topk": 8, "groups": 4, "moe-dim": 8, "moe-heads": 8}
    sizes |= {"batch": 1, "prompt": 32, "new-tokens": 64, "rounds": 7}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="tokens per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of each")
    parser.add_argument("--decompose", default="vertical", choices=("vertical", "horizontal"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--config", nargs="+", help="routing, systems: configs of trained runs")
    parser.add_argument("--rows", type=int, default=64, help="of each domain there, default 64")
    parser.add_argument("--vectors", type=int, nargs="+", default=[100_000], help="clusters: N")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[100], help="data: of text")
    parser.add_argument("--languages", default="en,de,hi,zh", help="data: default en,de,hi,zh")
    parser.add_argument("--processes", type=int, default=2, help="data: default 2")
    paths = ("route", "mix", "score", "documents", "clusters")
    parser.add_argument("--path", default="route", choices=paths, help="scaling: what is timed")
    parser.add_argument(
        "--partitions", type=int, nargs="+", default=[1, 16, 64, 256, 1024], help="scaling: n"
    )
    parser.add_argument("--only", nargs="+", help="contenders; ours is always the first")
    parser.add_argument("--reference", type=Path, help="a file that offers another Monet")
    parser.add_argument("--reference-python", default=sys.executable, help="its interpreter")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser.parse_args()


def main() -> None:
    """Race the contenders of a case, per number of tokens."""
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
        return
    given = parse()
    kinds = list(CASES[given.case])
    if given.only:
        kinds = ["ours", *(k for k in given.only if k != "ours")]
    if given.case in ("routing", "systems") and not given.config:
        raise SystemExit(f"bench.py: {given.case}: --config CONFIG of a trained run is needed")
    if given.case == "systems":
        kinds = given.config
    if given.case == "scaling":
        kinds = [str(n) for n in given.partitions]
        if given.path in ("documents", "clusters"):
            given.length = 1
    known = {*(given.config or ()), *map(str, given.partitions)} | {
        kind for case in CASES.values() for kind in case
    }
    if unknown := set(kinds) - known:
        raise SystemExit(f"bench.py: --only: {', '.join(unknown)}: not one of {', '.join(known)}")
    if given.case == "data":
        sys.path.insert(0, str(ROOT))
        from bench_data import race_data

        with tempfile.TemporaryDirectory() as folder:
            rows = race_data(given, kinds, Path(folder))
        if given.json:
            given.json.write_text(json.dumps(rows, indent=1) + "\n")
        return
    if given.case == "clusters":
        given.tokens, given.length = given.vectors, 1
    if any(tokens % given.length for tokens in given.tokens):
        raise SystemExit(f"bench.py: --tokens: whole rows of --length {given.length} are needed")
    if given.reference:
        kinds.append("reference")
    size = {k: str(v) if isinstance(v, Path) else v for k, v in vars(given).items()}
    result = {"case": given.case, "size": size, "machine": platform.processor(), "races": []}
    for tokens in given.tokens:
        rows = race(
            given.case, kinds, {**size, "tokens": tokens}, given.rounds, given.reference_python
        )
        title, made = title_of(given, tokens)
        print_rows(f"{title}, {given.threads} threads", rows, made)
        result["races"].append({"tokens": tokens, "rows": rows})
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
