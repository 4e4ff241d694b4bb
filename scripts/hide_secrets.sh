# Sourced before anything is submitted: Slurm writes down the environment of a job, so keys leave it
# here; jobs read secrets.env themselves.
for key in $(compgen -e); do
  case $key in
    *API_KEY | *_TOKEN | *SECRET* | *PASSWORD*) unset "$key" ;;
  esac
done
if [ -f "$ROOT/secrets.env" ]; then # whatever it sets, in whatever way: asked of a shell that reads it
  for key in $(env -i bash -c '
    known=$(compgen -v)
    set -a
    source "$1" >/dev/null 2>&1
    comm -13 <(sort <<<"$known") <(compgen -v | sort)' _ "$ROOT/secrets.env"); do
    unset "$key" 2>/dev/null || true
  done
fi
