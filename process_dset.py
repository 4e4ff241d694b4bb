"""Turn raw text into cleaned, tokenised, split documents per domain.

Reads   data.source: a hub dataset, a folder in its layout, or a folder with a sub-folder per domain
Writes  data/processed/<key>/ (tokenizer/, <domain>/<split>/, manifest.json), where <key> is the
        hash of every setting that can change the result; finished domains are skipped

    python process_dset.py configs/quickstart/n16.yaml                  # CPU, bundled sample
    python process_dset.py configs/c4/n16.yaml data.num_proc=16

Several machines can share the work: with data.task=read data.task_count=8 data.task_index=0 .. 7
each call reads its own source files and stops; data.task=merge makes the cleaned text and the
tokenizer of them; data.task=tokenise is shared as read is, domain by domain. A call without these
does what is left.
"""

from tiered import processing
from tiered.config import Config, run_script
from tiered.data import processed_folder
from tiered.workers import processes


def main(config: Config) -> None:
    """Processed data of one experiment's present domains."""
    # 1. where it goes, and who works on it
    folder, task = processed_folder(config), config.data.task
    share = f"{config.name} {task} {config.data.task_index + 1} of {config.data.task_count}"
    with processes(config.data.num_proc) as pool:
        if task == "read":
            print(f"{share}: {processing.read_share(config, pool)}")
            return
        # 2. raw text -> cleaned text: normalise, filter, deduplicate, domain by domain
        if task != "tokenise":
            processing.clean_present_domains(config, pool)
        # 3. the tokenizer all partitions share
        tokenizer = processing.make_tokenizer(config, pool)
        if task == "merge":
            print(f"{share}: {folder / 'tokenizer'}")
            return
        # 4. cleaned text -> tokens, splits, training budget, repeated rows
        made = processing.tokenize_domains(config, pool, tokenizer["hash"])
    if task == "tokenise":
        print(f"{share}: {' '.join(made) or 'no domain'} made")
        return
    # 5. one manifest over all domains that are there
    manifest = processing.write_manifest(config, tokenizer)
    # 6. what came out
    print(processing.summary(config, manifest))
    print(f"\n{folder}: {len(made)} domains made, {len(config.processed_domains)} present")


if __name__ == "__main__":
    run_script(main, __doc__)
