# Sourced before anything is submitted: Slurm writes down the environment of a job, so keys leave it
# here; jobs read secrets.env themselves.
unset WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN
if [ -f "$ROOT/secrets.env" ]; then
  while read -r key; do unset "$key"; done < <(
    sed -nE 's/^(export +)?([A-Za-z_][A-Za-z_0-9]*)=.*/\2/p' "$ROOT/secrets.env")
fi
