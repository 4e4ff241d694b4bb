# What differs between clusters, and nothing else: sourced by slurm.sh and by every job. Change it
# here, or keep a copy elsewhere and name it: SITE=~/my_site.sh bash scripts/slurm.sh CONFIG
# Arrays hold options of sbatch. Ask for one type of GPU node (--gres=gpu:a100:1, --constraint): what
# another type computes has other last bits, so a training that moves there begins anew.
SITE_ALL=()                                    # every job: (--account=... --qos=...)
SITE_CPU=(--cpus-per-task=16 --mem=64G --time=24:00:00)            # reading, tokenising, report
SITE_GPU=(--cpus-per-task=8 --mem=64G --time=24:00:00 --gres=gpu:1)     # router, training, scores
SITE_GPUS=1            # GPUs of one partition's training, by torchrun: they share the micro-batches
                       # of a step, training.gradient_accumulation_steps has to be a multiple
SITE_SEVERAL=(--cpus-per-task=16 --mem=128G --time=24:00:00 "--gres=gpu:$SITE_GPUS")
SITE_READING_TASKS=8                           # nodes that share the reading; 0: no sharing
SITE_CPU_LIMIT=8                               # tasks of a CPU job array that run at a time
SITE_GPU_LIMIT=16                              # and of a GPU one
SITE_GRACE=180                                 # seconds before the time limit to save and requeue
SITE_RESTARTS=30                               # how often a task is queued again, at most
export HF_HUB_OFFLINE=0                       # here, not on the command line; 1: all is on disk
site_prepare() { :; }                          # on the node, before Python: module load ...
