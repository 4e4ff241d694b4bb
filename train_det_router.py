"""Level 1: train the embedder, compute centroids, write the partition map.

Reads   data/processed/<key>/ (process_dset.py)
Writes  runs/<experiment>/router/, partition/map.json, provenance.json

    python train_det_router.py configs/quickstart/n16.yaml            # CPU, about a minute
    python train_det_router.py configs/c4/trained/n16.yaml            # one GPU
"""

from tiered.config import Config, run_script
from tiered.data import ProcessedData
from tiered.partition import make_partition_map
from tiered.record import note_provenance, start, timed
from tiered.router import make_router, save_router, train_embedder, write_partition_map


def main(config: Config) -> None:
    """Embedder, centroids and map of one experiment."""
    # 1. the partition map: a function of the config alone
    partitions = make_partition_map(config)
    # 2. processed data
    data = ProcessedData(config)
    start(config, "train_det_router")
    with timed(config, "train_det_router") as timer:
        write_partition_map(config, partitions)
        # 3. the embedder, shared by experiments that agree on it
        embedder = train_embedder(config, data)
        # 4. centroids of domains, or of partitions when documents are spread at random
        router, domains = make_router(config, data, partitions, embedder)
        # 5. the run's router folder
        save_router(config.run_dir / "router", router, domains, embedder)
    note_provenance(
        config,
        {
            "tokenizer": sorted(data.manifest["tokenizer"]["trained_on"]),
            "router": list(data.domains) if embedder else [],
            "centroids": [d or sorted(data.domains) for d in domains],
        },
    )
    print(f"{config.run_dir / 'router'}: {len(domains)} centroids, {timer.seconds:.1f} s")


if __name__ == "__main__":
    run_script(main, __doc__)
