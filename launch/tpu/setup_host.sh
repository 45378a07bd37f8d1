#!/usr/bin/env bash
# Sets up one host of a pod, as root, in a copy of this repository: Python 3.11, .venv with jax[tpu], buckets mounted. What is there stays.
#
#   setup_host.sh [--bucket NAME]... [--dry-run]
#
# --bucket    gs://NAME is mounted on /mnt/NAME with gcsfuse
# --dry-run   prints what it would run on this host
set -euo pipefail

PACKAGES=https://packages.cloud.google.com/apt
APT=(apt-get -o DPkg::Lock::Timeout=600 --yes --quiet)  # a host's own updates hold the lock in its first minutes

fail() { echo "error: $1" >&2; exit 2; }

buckets=() dry_run=''
while (($#)); do
  case $1 in
    --help) sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
    --bucket)
      [[ ${2:-} =~ ^[a-z0-9][-a-z0-9_.]+$ ]] || fail "--bucket takes a bucket's name without gs://, not '${2:-}'"
      buckets+=("$2")
      shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    *) fail "unknown argument '$1' of setup_host.sh; see --help" ;;
  esac
done
cd "$(dirname "$0")/../.."

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

install_python() {
  run add-apt-repository --yes ppa:deadsnakes/ppa  # Ubuntu 22.04, which the hosts run, has 3.10
  run "${APT[@]}" install python3.11 python3.11-venv
}

install_gcsfuse() {
  local release
  # shellcheck source=/dev/null
  release=$(. /etc/os-release && echo "${VERSION_CODENAME:-jammy}")
  run curl --silent --show-error --fail --output /usr/share/keyrings/cloud.google.asc "$PACKAGES/doc/apt-key.gpg"
  run bash -c "echo 'deb [signed-by=/usr/share/keyrings/cloud.google.asc] $PACKAGES gcsfuse-$release main' > /etc/apt/sources.list.d/gcsfuse.list"
  run "${APT[@]}" update
  run "${APT[@]}" install gcsfuse
}

command -v python3.11 > /dev/null || install_python
if ! [[ .venv/.installed-tpu -nt setup.py ]]; then
  run python3.11 -m venv .venv
  run .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[tpu]'
  run touch .venv/.installed-tpu
fi
if ((${#buckets[@]})); then
  command -v gcsfuse > /dev/null || install_gcsfuse
  for bucket in "${buckets[@]}"; do
    if ! mountpoint --quiet "/mnt/$bucket"; then
      run mkdir -p "/mnt/$bucket"
      run gcsfuse --implicit-dirs -o allow_other "$bucket" "/mnt/$bucket"
    fi
  done
fi
