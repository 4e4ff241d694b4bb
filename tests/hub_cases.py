"""Processing from a hub on localhost through its faults, in one process; results as JSON.

usage: python tests/hub_cases.py ROOT OUTPUT     ROOT: repositories by name; OUTPUT: a folder
"""

import json
import os
import sys
from pathlib import Path

from tests.hub_server import Fault, Hub

DATA = r"resolve/.*part-1\.json\.gz"
FAULTS = {  # once, each in a run of its own
    "calm": [],
    **{
        f"{kind} {name}": [Fault(method, path, kind)]
        for kind in ("503", "429", "drop")
        for name, method, path in (
            ("info", "GET", r"/api/datasets/[^/]+/c4(/revision/.*)?$"),
            ("tree", "GET", r"/api/datasets/[^/]+/c4/tree/"),
            ("readme", "GET", r"resolve/.*README\.md"),
            ("head", "HEAD", DATA),
            ("file", "GET", DATA),
            ("check", "POST", r"/paths-info/"),
        )
    },
    "truncate file": [Fault("GET", DATA, "truncate", 3)],
    "stall file": [Fault("GET", DATA, "stall")],
    "other file": [Fault("GET", DATA, "other")],
}
LASTING = {
    "503 file": [Fault("GET", DATA, "503", 10**6), Fault("HEAD", DATA, "503", 10**6)],
    "503 api": [Fault("GET", "/api/datasets", "503", 10**6)],
    "other file": [Fault("GET", DATA, "other", 10**6)],
}
TOKENIZER = {
    f"{kind} {method} {name}": [Fault(method, rf"resolve/.*{name}", kind)]
    for kind in ("503", "drop")
    for method in ("HEAD", "GET")
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
}


def main(root: Path, output: Path) -> None:
    """Every case on repositories and folders of its own, as the client keeps what it has seen."""
    hub = Hub(root)
    os.environ |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(output / "home"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    import process_dset
    from tiered import hub as client
    from tiered.config import Config, DataConfig, TokenizerConfig
    from tiered.data import processed_folder
    from tiered.store import UserError, read_json

    client.WAIT, client.FILE_SECONDS = 0.01, 4.0
    results: dict[str, dict] = {"once": {}, "lasting": {}, "healed": {}, "tokenizer": {}}

    def run(case: str, faults: list[Fault], tokenizer: str = "bytes", source: str = "c4") -> dict:
        hub.faults, hub.seen = faults, []
        name = case.replace(" ", "-").replace(".", "-")
        config = Config(
            name="hub",
            data=DataConfig(
                source=f"{name}/{source}",
                domains=("en",),
                num_proc=1,
                block_size=32,
                max_unk_share=1.0,
                processed_dir=str(output / name),
            ),
            tokenizer=TokenizerConfig(name=tokenizer),
        )
        try:
            process_dset.main(config)
        except UserError as error:
            return {"error": str(error), "requests": len(hub.seen)}
        manifest = read_json(processed_folder(config) / "manifest.json")
        found = manifest["domains"]["en"]
        return {
            "splits": found["splits"],
            "files": found["source"]["files"],
            "revision": found["source"]["revision"],
            "tokenizer": manifest["tokenizer"]["hash"],
            "struck": all(fault.times == 0 or fault.times > 2 for fault in faults),
            "left": sorted(str(p) for p in (output / name / ".fetched").glob("*")),
            "requests": len(hub.seen),
        }

    for case, faults in FAULTS.items():
        results["once"][case] = run(case, faults)
    for case, faults in LASTING.items():
        results["lasting"][case] = run(f"lasting {case}", faults)
        results["healed"][case] = run(f"lasting {case}", [])
    results["lasting"]["absent"] = run("absent", [], source="nothing")
    results["tokenizer"]["calm"] = run("tokenizer calm", [], "calm/words")
    for case, faults in TOKENIZER.items():
        name = case.replace(" ", "-").replace(".", "-")
        results["tokenizer"][case] = run(f"tokenizer {case}", faults, f"{name}/words")
    (output / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
