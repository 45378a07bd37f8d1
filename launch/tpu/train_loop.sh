#!/usr/bin/env bash
# Runs a training command on one host, and again where it ended with an exit code that a new start mends.
#
#   train_loop.sh [--restarts N] [--pause SECONDS] [--log FILE] [--dry-run] -- COMMAND [ARGUMENT ...]
#
# --restarts  at most so many (100); 0 where something else starts it anew, as a JobSet does
# --pause     seconds before a restart (10), in which the other hosts end too
# --log       a file that gets all output besides stdout, from where the serial console has it
#
# Not after 44, other hosts did not come in time: one that has ended for good would be waited for at every start. On GKE all start anew.
#
# SIGTERM goes on to the command, which saves and ends; nothing is restarted after it. How long that may take is for whoever sends
# SIGKILL afterwards: systemd's TimeoutStopSec, Kubernetes' terminationGracePeriodSeconds. The exit code is that of the last start.
set -euo pipefail

declare -A MENDED=(
  [42]="asked to stop, and saved"
  [43]="no step came to its end: the watchdog"
  [134]="another host of the run is gone: JAX aborts"
  [143]="ended by SIGTERM before there was anything to save"
)

fail() { echo "error: $1" >&2; exit 2; }
tell() { echo "train_loop: $1"; }

restarts=100 pause=10 log='' dry_run=''
while (($#)); do
  case $1 in
    --help) sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p;}' "$0"; exit ;;
    --restarts | --pause | --log)
      (($# > 1)) || fail "$1 needs a value"
      [[ $1 == --log || $2 =~ ^[0-9]+$ ]] || fail "$1 takes a number, not '$2'"
      declare "${1#--}=$2"
      shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --) shift; break ;;
    *) fail "unknown argument '$1' of train_loop.sh; see --help" ;;
  esac
done
(($#)) || fail "no command after --"
if [[ $dry_run ]]; then
  printf '%q ' "$@"
  printf '\n'
  exit
fi

tee=''
if [[ $log ]]; then
  exec > >(trap '' TERM INT; exec tee -a "$log") 2>&1
  tee=$!
fi

child='' stopping='' interrupted=''
trap 'stopping=1 interrupted=1; [[ -z $child ]] || kill -TERM "$child" 2> /dev/null || true' TERM INT

start=0
while :; do
  "$@" &
  child=$!
  [[ -z $stopping ]] || kill -TERM "$child"
  while :; do  # a signal ends `wait` before the command ends
    interrupted='' code=0
    wait "$child" || code=$?
    [[ $interrupted ]] || break
  done
  child=''
  reason=${MENDED[$code]:-}
  tell "exit code $code${reason:+ ($reason)}"
  [[ $reason && -z $stopping ]] || break
  ((start < restarts)) || { ((restarts == 0)) || tell "gave up after $restarts restarts"; break; }
  sleep "$pause" &> /dev/null &
  wait $! || true  # until SIGTERM
  [[ -z $stopping ]] || break
  start=$((start + 1))
  tell "restart $start of $restarts"
done
if [[ $tee ]]; then  # all of the log is written before this process is gone
  exec >&- 2>&-
  wait "$tee" || true
fi
exit "$code"
