# What differs between clusters, and nothing else: sourced by slurm.sh and by every job. Change it
# here, or keep a copy elsewhere and name it: SITE=~/my_site.sh bash scripts/slurm.sh CONFIG
# Arrays hold options of sbatch.
SITE_ALL=()                                    # every job: (--account=... --qos=...)
SITE_CPU=(--cpus-per-task=16 --mem=64G --time=24:00:00)            # reading, tokenising, report
SITE_GPU=(--cpus-per-task=8 --mem=64G --time=24:00:00 --gres=gpu:1)     # router, training, scores
SITE_GPUS=1                                    # GPUs of one partition's training, by torchrun
SITE_SEVERAL=(--cpus-per-task=16 --mem=128G --time=24:00:00 "--gres=gpu:$SITE_GPUS")
SITE_READING_TASKS=8                           # nodes that share the reading; 0: no sharing
SITE_CPU_LIMIT=8                               # tasks of a CPU job array that run at a time
SITE_GPU_LIMIT=16                              # and of a GPU one
SITE_GRACE=180                                 # seconds before the time limit to save and requeue
export HF_HUB_OFFLINE=0                       # 1: all data and tokenizers are on disk
site_prepare() { :; }                          # on the node, before Python: module load ...
