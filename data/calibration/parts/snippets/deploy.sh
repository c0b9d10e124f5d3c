#!/usr/bin/env bash
# Deploys a release directory to the hosts of an inventory file, one after another.
set -euo pipefail
shopt -s nullglob

usage() {
  cat >&2 <<USAGE
usage: ${0##*/} [-n] [-i INVENTORY] RELEASE
  -n  only print what would be done
  -i  one host a line, '#' starts a comment (default: hosts.txt)
USAGE
  exit 2
}

dry_run=false
inventory=hosts.txt
while getopts ':ni:' option; do
  case $option in
    n) dry_run=true ;;
    i) inventory=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
[[ $# -eq 1 && -d $1 ]] || usage
release=$(basename -- "$1")

run() {
  printf '+ %q' "$1" && printf ' %q' "${@:2}" && printf '\n'
  "$dry_run" || "$@"
}

failed=()
while IFS= read -r line || [[ -n $line ]]; do
  host=${line%%#*}
  host=${host//[[:space:]]/}
  [[ -n $host ]] || continue
  if run rsync -az --delete "$1/" "$host:/srv/app/releases/$release/" &&
    run ssh -n "$host" "ln -sfn releases/$release /srv/app/current && systemctl reload app"; then
    echo "ok      $host"
  else
    failed+=("$host")
  fi
done < "$inventory"

if ((${#failed[@]} > 0)); then
  printf 'failed  %s\n' "${failed[@]}" >&2
  exit 1
fi
