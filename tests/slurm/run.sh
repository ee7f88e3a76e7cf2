#!/bin/bash
# Tests horovod_recipes/launch/train.slurm in a Slurm cluster of one node, which
# this script starts. It runs one job to its end; it stops and resumes another.
# Run it as root on Debian or Ubuntu, after `make demo`.
set -o errexit -o nounset

root=$(cd "$(dirname "$0")/../.." && pwd)
cluster=$(mktemp --directory --tmpdir slurm.XXXXXX)
daemons=()
export SLURM_CONF=$cluster/slurm.conf
# An epoch takes seconds. A stopped job ends with the same result.
export CONFIG=demo ARGS="--config.model.filters=2 --config.epochs=6
  --config.schedule.warmup_epochs=2 --config.deterministic"

main() {
  command -v munged sbatch slurmctld slurmd > /dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install --yes \
      --no-install-recommends munge slurm-wlm
  cd "$root"
  trap stop_cluster EXIT
  start_cluster
  whole_job
  stopped_job
  echo "slurm-tests: passed"
}

start_cluster() {
  chmod 755 "$cluster"
  mkdir "$cluster/state" "$cluster/spool"
  head --bytes=128 /dev/urandom > "$cluster/munge.key"
  chmod 400 "$cluster/munge.key"
  start munged --foreground --key-file="$cluster/munge.key" \
    --socket="$cluster/munge.socket" --pid-file="$cluster/munge.pid" \
    --seed-file="$cluster/munge.seed" --log-file="$cluster/munge.log"
  wait_for 10 "munged" test -S "$cluster/munge.socket"
  cat > "$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$(hostname --short)(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# Seconds that a job waits before it is queued again.
AuthInfo=socket=$cluster/munge.socket,cred_expire=5
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=$(hostname --short) NodeAddr=127.0.0.1 CPUs=$(nproc)
PartitionName=test Nodes=ALL Default=YES
END
  start slurmctld -D
  start slurmd -D
  wait_for 30 "the node" node_is_idle
}

whole_job() {
  echo "slurm-tests: a job to its end"
  submit whole
  wait_for 300 "job $job to end" no_jobs
  job_has JobState=COMPLETED
  cat "$cluster/whole/summary.json"
  grep --quiet '"ranks": 2, .*"steps": 18, "epochs": 6' \
    "$cluster/whole/summary.json"
}

stopped_job() {
  echo "slurm-tests: a job that is stopped, and resumes"
  submit stopped
  wait_for 200 "epoch 2 of job $job" in_log "Epoch 2/6"
  scancel --batch --signal=USR1 "$job"
  wait_for 60 "job $job to be queued again" job_has Restarts=1
  in_log "stopped by SIGTERM after step"
  [ ! -e "$cluster/stopped/summary.json" ]
  wait_for 300 "job $job to end" no_jobs
  job_has JobState=COMPLETED
  cat "$cluster/stopped/summary.json"
  # It resumed where it had stopped, and lost nothing.
  [ "$(grep --count "config=demo ranks=2" "$log")" = 2 ]
  [ "$(grep --count "Epoch 1/6" "$log")" = 1 ]
  [ "$(top1 stopped)" = "$(top1 whole)" ]
}

# Usage: submit NAME; sets $job and $log.
submit() {
  log=$cluster/$1.log
  job=$(WORKDIR=$cluster/$1 sbatch --parsable --output="$log" \
    horovod_recipes/launch/train.slurm)
}

job_has() {
  scontrol show job "$job" | grep --quiet "$1 "
}

no_jobs() {
  [ -z "$(squeue --noheader)" ]
}

in_log() {
  grep --quiet --no-messages "$1" "$log"
}

top1() {
  grep --only-matching '"top1": [0-9.]*' "$cluster/$1/summary.json"
}

node_is_idle() {
  sinfo --noheader --format=%T | grep --quiet "^idle"
}

# Usage: wait_for SECONDS WHAT COMMAND ...
wait_for() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    if [ "$SECONDS" -ge "$end" ]; then
      echo "slurm-tests: gave up waiting for $what" >&2
      return 1
    fi
    sleep 1
  done
}

# Usage: start DAEMON ...; the output goes to a file with the daemon's name.
start() {
  timeout --kill-after=10 1800 "$@" > "$cluster/$1.out" 2>&1 &
  daemons+=($!)
}

stop_cluster() {
  status=$?
  if [ "$status" != 0 ]; then
    tail --lines=30 "$cluster"/*.out "$cluster"/*.log >&2
  fi
  scancel --user=root || true
  wait_for 60 "jobs to end" no_jobs || true
  for pid in "${daemons[@]}"; do
    kill "$pid" || true
    wait "$pid" || true
  done
  rm --recursive --force "$cluster"
}

main
