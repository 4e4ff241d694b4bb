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
from tiered.router import (
    build_clusters,
    build_router,
    embedder_domains,
    write_partition_map,
)
from tiered.store import link_if_changed, read_json


def main(config: Config) -> None:
    """Embedder, centroids and map of one experiment."""
    # 1. processed data
    data = ProcessedData(config)
    start(config, "train_det_router")
    with timed(config, "train_det_router") as timer:
        # 2. the partition map: a function of the config alone, or fitted clusters of documents
        if config.partition.method == "cluster":
            link_if_changed(build_clusters(config, data), config.run_dir / "partition" / "clusters")
        partitions = make_partition_map(config)
        write_partition_map(config, partitions)
        # 3. embedder (shared by experiments that agree on it), then centroids of domains, or of
        #    partitions when documents are spread at random; taken from the store if unchanged
        folder = build_router(config, data, partitions)
        # 4. link it into the run folder
        link_if_changed(folder, config.run_dir / "router")
    # 5. whose data touched what
    domains = read_json(folder / "router.json")["domains"]
    trained = (folder / "embedder").is_dir()
    note_provenance(
        config,
        {
            "tokenizer": sorted(data.manifest["tokenizer"]["trained_on"]),
            "map": list(data.domains) if config.partition.method == "cluster" else [],
            "router": embedder_domains(config, data) if trained else [],
            "centroids": [d or sorted(data.domains) for d in domains],
        },
    )
    print(f"{config.run_dir / 'router'}: {len(domains)} centroids, {timer.seconds:.1f} s")


if __name__ == "__main__":
    run_script(main, __doc__)
