"""The import direction of the architecture, by an ast walk."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {p.stem for p in ROOT.glob("*.py")} - {"modeling_monet"}
LEAVES = {"domains", "metrics", "statistics", "stopping", "store"}
# module -> modules of ours it may import; what is missing may import any non-script.
ALLOWED = {
    "config": {"domains", "stopping", "store"},
    "partition": {"config", "domains", "store"},
    "cleaning": {"config", "domains", "sources", "store"},
    "hub": {"store"},
    "sources": {"config", "hub", "store"},
    "tokenization": {"hub", "store"},
    "processing": {
        *("cleaning", "config", "data", "locks", "sources", "store", "tokenization", "workers"),
    },
    "data": {"config", "domains", "store"},
    "modeling_tiered": set(),
    "flops": set(),
    "memory": {"flops"},
    "checkpoint": {"store"},
    "sealed": {"store"},
    "workers": {"stopping", "store"},
    "locks": {"store"},
    "runs": {"store"},
    "report_unlearning": {"metrics", "runs", "sealed", "statistics", "store"},
    "report_trunk": {"runs", "store"},
    "report_experts": {"runs", "store"},
    "report_seeds": {"report_experts", "runs", "statistics"},
    "report": {
        *("report_experts", "report_seeds", "report_trunk", "report_unlearning", "runs", "store"),
    },
    **{leaf: set() for leaf in LEAVES},
}
SHADOWED = {"datasets", "evaluate", "tokenizers", "accelerate", "wandb", "torch", "transformers"}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            if node.module == "tiered":
                names |= {f"tiered.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    return {n.split(".")[1] for n in imports(path) if n.startswith("tiered.")}


def test_import_direction():
    for path in (ROOT / "tiered").glob("*.py"):
        if path.stem in ALLOWED:
            assert own(path) <= ALLOWED[path.stem], path.stem


def test_model_files_import_torch_and_transformers_only():
    for path in [ROOT / "modeling_monet.py", *(ROOT / "tiered").rglob("modeling_*.py")]:
        foreign = {n.split(".")[0] for n in imports(path)}
        # huggingface_hub comes with transformers and holds its config decorator
        assert foreign - sys.stdlib_module_names <= {"torch", "transformers", "huggingface_hub"}, (
            path.name
        )


def test_nothing_imports_a_script_and_scripts_hold_no_model():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tiered").rglob("*.py")]:
        assert not {n.split(".")[0] for n in imports(path)} & SCRIPTS, path
    for name in SCRIPTS:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        assert not [n for n in tree.body if isinstance(n, ast.ClassDef)], name
        guard = [n for n in tree.body if isinstance(n, ast.If)]
        assert len(guard) == 1, f"{name}: nothing but the main guard runs at import"


def test_no_root_name_shadows_a_library():
    assert not {p.stem for p in ROOT.iterdir()} & SHADOWED


def test_no_cycle_between_modules():
    graph = {p.stem: own(p) for p in (ROOT / "tiered").glob("*.py")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_no_pickle():
    for path in [*ROOT.glob("*.py"), *(ROOT / "tiered").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for word in ("torch.save(", "torch.load(", "import pickle"):
            assert word not in text, (path, word)
