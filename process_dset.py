"""Turn raw text into cleaned, tokenised, split documents per domain.

Reads   data.source: a hub dataset, a folder in its layout, or a folder with a sub-folder per domain
Writes  data/processed/<key>/ (tokenizer/, <domain>/<split>/, manifest.json), where <key> is the
        hash of every setting that can change the result; finished domains are skipped

    python process_dset.py configs/quickstart/n16.yaml                  # CPU, bundled sample
    python process_dset.py configs/c4/n16.yaml data.num_proc=16

Reading can be shared by calls on several machines: with data.task_count=8 data.task_index=0 .. 7
each reads its own source files and stops; the call without them then does the rest.
"""

from tiered import processing
from tiered.config import Config, run_script
from tiered.data import processed_folder
from tiered.workers import processes


def main(config: Config) -> None:
    """Processed data of one experiment's present domains."""
    # 1. where it goes, and who works on it
    folder = processed_folder(config)
    with processes(config.data.num_proc) as pool:
        if config.data.task_count > 1:
            print(processing.read_share(config, pool))
            return
        # 2. raw text -> cleaned text: normalise, filter, deduplicate, domain by domain
        processing.clean_present_domains(config, pool)
        # 3. the tokenizer all partitions share
        tokenizer = processing.make_tokenizer(config, pool)
        # 4. cleaned text -> tokens, splits, training budget, repeated rows
        made = processing.tokenize_domains(config, pool, tokenizer["hash"])
    # 5. one manifest over all domains that are there
    manifest = processing.write_manifest(config, tokenizer)
    # 6. what came out
    print(processing.summary(config, manifest))
    print(f"\n{folder}: {len(made)} domains made, {len(config.processed_domains)} present")


if __name__ == "__main__":
    run_script(main, __doc__)
