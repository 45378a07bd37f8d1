#!/usr/bin/env bash
# Train on a TPU pod: on a queued resource of TPU VMs, or on GKE through xpk or as a plain JobSet. docs/pods.md says more.
#
#   pod.sh create  --name N --project P --zone Z --topology T --bucket B --workdir /mnt/B/DIR --code CODE [RUN] [--spot] -- TRAINING
#   pod.sh xpk     --name N --project P --zone Z --topology T --bucket B --workdir /mnt/B/DIR --cluster C [--image I] [RUN] -- TRAINING
#   pod.sh jobset  --name N --topology T --bucket B --workdir /mnt/B/DIR --image I [RUN] [--spot] -- TRAINING
#   pod.sh status  --name N --project P --zone Z
#   pod.sh logs    --name N --project P --zone Z [--slices N] [--worker 0|all] [--follow]
#   pod.sh profile --name N --project P --zone Z --workdir /mnt/B/DIR [--slices N] [--worker 0|all] [--seconds 5]
#   pod.sh stop    --name N --project P --zone Z [--slices N]
#   pod.sh delete  --name N --project P --zone Z
#
# TRAINING    launch.train's arguments but --workdir: --config configs/media.py --config.KEY=VALUE ...
# RUN         [--slices N] [--bucket B]... [--flags none|latency] [--grace SECONDS]
# --topology  a chip and a shape, v5p:4x4x4; --slices: so many of it (1), joined by the data centre's network
# --bucket    gs://B is mounted on /mnt/B, on every host
# --code      what the hosts run: URL@COMMIT, a git repository that they can read, or gs://B/FILE.tar.gz, made by `git archive`
# --image     for GKE: launch/tpu/Dockerfile makes one. xpk without it: this repository, copied into python:3.11 and set up at the start
# --flags     of libtpu: latency hides collectives behind computation, and compiles four times as long
# --grace     seconds that a save may take after SIGTERM (600); spot machines give about 30, whatever stands here
# --slices, --worker of logs, profile, stop: logs and profile are of the first slice's host 0, or of all hosts
# --dry-run   prints the commands and files, and runs and writes nothing
set -euo pipefail

fail() { echo "error: $1" >&2; exit 2; }
((BASH_VERSINFO[0] >= 5)) || fail "pod.sh needs bash 5, this is $BASH_VERSION"

# chip -> prefix of its accelerator types, cores that they count a chip, dims of a shape, runtime of its TPU VMs (-: on GKE alone), GKE's label
declare -A CHIPS=(
  [v4]="v4 2 3 tpu-ubuntu2204-base tpu-v4-podslice"
  [v5e]="v5litepod 1 2 v2-alpha-tpuv5-lite tpu-v5-lite-podslice"
  [v5p]="v5p 2 3 v2-alpha-tpuv5 tpu-v5p-slice"
  [v6e]="v6e 1 2 v2-alpha-tpuv6e tpu-v6e-slice"
  [tpu7x]="tpu7x 2 3 - tpu7x"
)
CHIPS_A_HOST=4
declare -A FLAGS=(
  [none]=""
  [latency]="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
MACHINE="name project zone"
RUN="topology workdir bucket"
declare -A REQUIRED=(
  [create]="$MACHINE $RUN code" [xpk]="$MACHINE $RUN cluster" [jobset]="name $RUN image"
  [status]="$MACHINE" [logs]="$MACHINE" [profile]="$MACHINE workdir" [stop]="$MACHINE" [delete]="$MACHINE"
)
declare -A OPTIONAL=(
  [create]="slices flags grace spot" [xpk]="slices flags grace image" [jobset]="slices flags grace spot"
  [status]="" [logs]="slices worker follow" [profile]="slices worker seconds" [stop]="slices" [delete]=""
)
SWITCHES=" spot follow dry-run "
# option -> an example, and what its values must match
declare -A FORMS=(
  [name]="vino-a [a-z]([-a-z0-9]{0,38}[a-z0-9])?"
  [topology]="v5p:4x4x4 [a-z0-9]+:[0-9x]+"
  [bucket]="my-bucket [a-z0-9][-a-z0-9_.]+"
  [workdir]="/mnt/BUCKET/runs/a /[^[:space:]]+"
  [code]="https://HOST/REPOSITORY@COMMIT,_COMMIT_of_7_to_40_hex_digits,_or_gs://BUCKET/FILE.tar.gz gs://.+\.tar\.gz|(https://|ssh://|git@).+@[0-9a-f]{7,40}"
  [slices]="2 [1-9][0-9]*" [grace]="600 [1-9][0-9]*" [seconds]="5 [1-9][0-9]*" [worker]="0_or_all [0-9]+|all"
)
RESTART_ON="42 43 44 134 143"  # train_loop.sh says why; 44: other hosts did not come in time
RESTARTS=100
PROFILE_PORT=9012
HOME_ON_HOST=/opt/vino_jax
LOG=/var/log/vino_train.log
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() { sed -n '2,/^set/{/^#/!d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

read_arguments() {
  local name value example form
  command=${1:-}
  [[ $command != --help && ${2:-} != --help ]] || { usage; exit; }
  [[ $command && -v REQUIRED[$command] ]] ||
    fail "'$command' is no command of pod.sh; it must be one of create, xpk, jobset, status, logs, profile, stop, delete; see --help"
  shift
  declare -gA given=([slices]=1 [flags]=none [grace]=600 [worker]=0 [seconds]=5)
  buckets=() training=()
  while (($#)); do
    [[ $1 != -- ]] || { training=("${@:2}"); break; }
    name=${1%%=*} name=${name#--}
    [[ $1 == --* && " ${REQUIRED[$command]} ${OPTIONAL[$command]} dry-run " == *" $name "* ]] ||
      fail "'pod.sh $command' takes no '${1%%=*}' before --; see pod.sh --help"
    if [[ $SWITCHES == *" $name "* ]]; then
      [[ $1 != *=* ]] || fail "--$name takes no value"
      value=1
    elif [[ $1 == *=* ]]; then
      value=${1#*=}
    else
      (($# > 1)) || fail "--$name needs a value"
      value=$2
      shift
    fi
    read -r example form <<< "${FORMS[$name]:-a_word [^[:space:]]+}"
    [[ $value =~ ^($form)$ ]] || fail "--$name must be like ${example//_/ }, not '$value'"
    [[ $name != bucket ]] || buckets+=("$value")
    given[$name]=$value
    shift
  done
  for name in ${REQUIRED[$command]}; do
    [[ -v given[$name] ]] || fail "'pod.sh $command' needs --$name"
  done
}

check_run() {
  local bucket mounted='' dims
  [[ -v FLAGS[${given[flags]}] ]] || fail "--flags must be one of ${!FLAGS[*]}, not '${given[flags]}'"
  ((${#training[@]})) || fail "no arguments of launch.train after --, such as --config configs/media.py"
  for bucket in "${buckets[@]}"; do
    [[ ${given[workdir]} != /mnt/$bucket/?* ]] || mounted=1
  done
  [[ $mounted ]] || fail "--workdir ${given[workdir]} lies in none of the buckets; on a pod it must be /mnt/BUCKET/DIR, with --bucket BUCKET"

  chip=${given[topology]%%:*} shape=${given[topology]#*:}
  [[ -v CHIPS[$chip] ]] || fail "unknown chip '$chip' in --topology ${given[topology]}; it must be one of ${!CHIPS[*]}"
  read -r prefix cores dims runtime accelerator <<< "${CHIPS[$chip]}"
  [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){$((dims - 1))}$ ]] || fail "--topology ${given[topology]}: a shape of $chip has $dims sizes"
  chips=$((${shape//x/*}))
  ((chips % CHIPS_A_HOST == 0)) || fail "--topology ${given[topology]}: $chips chips are not whole hosts of $CHIPS_A_HOST"
  accelerator_type=$prefix-$((chips * cores))
  [[ $command != create || $runtime != - ]] || fail "$chip is on GKE alone; use pod.sh xpk or pod.sh jobset"

  environment=(VINO_DISTRIBUTED=1 PYTHONUNBUFFERED=1 "JAX_COMPILATION_CACHE_DIR=${given[workdir]}/compile_cache")
  [[ -z ${FLAGS[${given[flags]}]} ]] || environment+=("LIBTPU_INIT_ARGS=${FLAGS[${given[flags]}]}")
}

quoted() { local text; printf -v text '%q ' "$@"; printf '%s' "${text% }"; }

run() {
  if [[ -v given[dry-run] ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# run_with NAME TEXT COMMAND...: the command, with a file NAME of this text in the place of @FILE@
run_with() {
  local name=$1 text=$2 folder code=0
  shift 2
  if [[ -v given[dry-run] ]]; then
    printf -- '--- %s\n%s\n---\n' "$name" "$text"
    run "${@//@FILE@/$name}"
  else
    folder=$(mktemp -d)
    printf '%s\n' "$text" > "$folder/$name"
    "${@//@FILE@/$folder/$name}" || code=$?
    rm -r "$folder"
    return "$code"
  fi
}

gcloud_tpus() { run gcloud compute tpus "$@" --project "${given[project]}" --zone "${given[zone]}"; }

# nodes COUNT: names of the first slices' TPU VMs
nodes() {
  local i
  if ((given[slices] == 1)); then
    echo "${given[name]}"
  else
    for ((i = 0; i < $1; i++)); do echo "${given[name]}-$i"; done
  fi
}

# on_hosts SLICES WORKER COMMAND: on all slices at once, as what stops or is followed does not end by itself
on_hosts() {
  local node pids=() pid code=0
  for node in $(nodes "$1"); do
    gcloud_tpus tpu-vm ssh "$node" --worker "$2" --command "$3" &
    pids+=($!)
    [[ ! -v given[dry-run] ]] || wait $!
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

slices_asked() { if [[ ${given[worker]} == all ]]; then echo "${given[slices]}"; else echo 1; fi; }

# What every host runs as root at every boot: after a reboot the run goes on by itself.
startup_script() {
  local code=${given[code]} fetch bucket bucket_flags=() setenv=() variable
  if [[ $code == gs://* ]]; then
    fetch="gcloud storage cat $(quoted "$code") | tar xz"
  else
    fetch="[[ -d .git ]] || git clone --quiet $(quoted "${code%@*}") ."$'\n'"git checkout --quiet --force ${code##*@}"
  fi
  for bucket in "${buckets[@]}"; do bucket_flags+=(--bucket "$bucket"); done
  for variable in HOME=/root "${environment[@]}"; do setenv+=("--setenv=$variable"); done
  cat << END
#!/bin/bash
# Start-up script of each host of the run ${given[name]}, written by launch/tpu/pod.sh
set -euo pipefail
export HOME=/root PATH=\$PATH:/snap/bin
if systemctl is-active --quiet vino-train; then exit; fi
mkdir -p $HOME_ON_HOST
cd $HOME_ON_HOST
$fetch
bash launch/tpu/setup_host.sh $(quoted "${bucket_flags[@]}")
# A service, so that a shutdown sends SIGTERM and waits for the save; mixed: to train_loop.sh alone, which hands it on. systemd reads
# \$\$ as \$
systemd-run --unit=vino-train --collect --property=KillMode=mixed --property=TimeoutStopSec=${given[grace]} \\
  --property=StandardOutput=journal+console --property=StandardError=inherit --working-directory=$HOME_ON_HOST \\
  $(quoted "${setenv[@]}") \\
  bash launch/tpu/train_loop.sh --restarts $RESTARTS --log $LOG -- .venv/bin/python $(quoted "${arguments[@]//\$/\$\$}")
END
}

do_create() {
  local where=(--node-id "${given[name]}")
  ((given[slices] == 1)) || where=(--node-count "${given[slices]}" --node-prefix "${given[name]}")
  run_with startup_script.sh "$(startup_script)" gcloud compute tpus queued-resources create "${given[name]}" \
    --project "${given[project]}" --zone "${given[zone]}" --accelerator-type "$accelerator_type" --runtime-version "$runtime" \
    "${where[@]}" ${given[spot]:+--spot} --metadata-from-file startup-script=@FILE@
}

do_xpk() {
  local source bucket variable flags=() start
  start="exec bash launch/tpu/train_loop.sh --restarts 0 --"
  if [[ -v given[image] ]]; then
    source=(--docker-image "${given[image]}") start+=" python"
  else
    source=(--base-docker-image python:3.11 --script-dir "$(cd "$HERE/../.." && pwd)")
    start="bash launch/tpu/setup_host.sh && $start .venv/bin/python"
  fi
  for bucket in "${buckets[@]}"; do flags+=(--storage "$bucket"); done
  for variable in "${environment[@]}"; do flags+=(--env "$variable"); done
  run xpk workload create --workload "${given[name]}" --cluster "${given[cluster]}" --project "${given[project]}" --zone "${given[zone]}" \
    --tpu-type "$accelerator_type" --num-slices "${given[slices]}" --docker-name train "${source[@]}" "${flags[@]}" \
    --max-restarts "$RESTARTS" --restart-on-exit-codes "${RESTART_ON// /,}" --termination-grace-period-seconds "${given[grace]}" \
    --command "$start $(quoted "${arguments[@]}")"
}

json() { local text=${1//\\/\\\\}; printf '"%s"' "${text//\"/\\\"}"; }

do_jobset() {
  local text item commands='' variables='' mounts='' volumes='' multislice=false hosts=$((chips / CHIPS_A_HOST))
  for item in bash launch/tpu/train_loop.sh --restarts 0 -- python "${arguments[@]}"; do commands+=", $(json "$item")"; done
  for item in "${environment[@]}"; do variables+=", {name: ${item%%=*}, value: $(json "${item#*=}")}"; done
  ((given[slices] == 1)) || multislice=true
  for item in "${!buckets[@]}"; do
    mounts+=", {name: bucket-$item, mountPath: \"/mnt/${buckets[item]}\"}"
    volumes+=", {name: bucket-$item, csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: "
    volumes+="{bucketName: \"${buckets[item]}\", mountOptions: implicit-dirs, hostNetworkPodKSA: \"$multislice\"}}}"
  done
  local -A places=(
    [NAME]=${given[name]} [SLICES]=${given[slices]} [HOSTS]=$hosts [GRACE]=${given[grace]} [RESTARTS]=$RESTARTS [CODES]=${RESTART_ON// /, }
    [ACCELERATOR]=$accelerator [SHAPE]=$shape [CHIPS]=$CHIPS_A_HOST [SPOT]=${given[spot]:+, cloud.google.com/gke-spot: \"true\"}
    [MULTISLICE]=$multislice [IMAGE]=${given[image]} [COMMAND]=${commands#, } [ENVIRONMENT]=${variables#, } [MOUNTS]=$mounts [VOLUMES]=$volumes
  )
  text=$(sed 1d "$HERE/jobset.yaml")
  for item in "${!places[@]}"; do text=${text//"@$item@"/"${places[$item]}"}; done
  run_with jobset.yaml "$text" kubectl apply --filename @FILE@
}

do_status() { gcloud_tpus queued-resources describe "${given[name]}" --format "yaml(state, tpu.nodeSpec)"; }

do_logs() { on_hosts "$(slices_asked)" "${given[worker]}" "sudo tail --lines 100${given[follow]:+ --follow=name} $LOG"; }

# In an environment of its own: the profiler's packages are not those of the training.
do_profile() {
  local home=/opt/vino_profile
  on_hosts "$(slices_asked)" "${given[worker]}" "sudo bash -c '[ -d $home ] || python3.11 -m venv $home; \
$home/bin/pip install --quiet \"jax<0.11\" xprof && \
$home/bin/python -m jax.collect_profile $PROFILE_PORT $((given[seconds] * 1000)) --log_dir ${given[workdir]}/profile --no_perfetto_link'"
}

do_stop() { on_hosts "${given[slices]}" all "sudo systemctl stop vino-train"; }

do_delete() { gcloud_tpus queued-resources delete "${given[name]}" --force --quiet; }

read_arguments "$@"
case $command in
  create | xpk | jobset)
    check_run
    arguments=(-m launch.train --workdir "${given[workdir]}" "${training[@]}") ;;
esac
"do_$command"
