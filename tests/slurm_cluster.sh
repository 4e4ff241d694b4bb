#!/usr/bin/env bash
# Slurm on localhost for tests: one machine that plays NODES nodes, no systemd, as root.
# usage: slurm_cluster.sh start|stop FOLDER [NODES]     (packages: slurm-wlm, munge)
set -euo pipefail
action=$1 folder=$2 nodes=${3:-2}
host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf

configure() {
  mkdir -p "$folder"/{state,log,run,munge}
  for n in $(seq "$nodes"); do mkdir -p "$folder/spool/n$n"; done
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
  # ports that nobody listens on, next to each other: controller, then a daemon per node
  read -r port < <(python3 - "$nodes" <<'P'
import socket, sys
count = int(sys.argv[1]) + 1
for base in range(21000, 60000, 97):
    try:
        found = [socket.socket() for _ in range(count)]
        for i, s in enumerate(found):
            s.bind(("127.0.0.1", base + i))
        print(base)
        break
    except OSError:
        continue
P
)
  cat >"$SLURM_CONF" <<C
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=1 RealMemory=2000 State=UNKNOWN
PartitionName=DEFAULT Nodes=n[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=test Default=YES
PartitionName=noticed GraceTime=60
PartitionName=urgent PriorityTier=2
C
}

start() {
  configure
  dd if=/dev/urandom of="$folder/munge/munge.key" bs=1024 count=1 status=none
  chmod 600 "$folder/munge/munge.key"
  chmod 700 "$folder/munge"
  chmod 755 "$folder" "$folder/run" "$folder/log"
  # --force: the socket may stand below a folder that everybody can write to
  munged --force --key-file="$folder/munge/munge.key" --socket="$folder/run/munge.sock" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/munge/seed"
  slurmctld -f "$SLURM_CONF"
  for n in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$n"; done
  for _ in $(seq 120); do
    if [ "$(sinfo -h -N -p test -o %t 2>/dev/null | grep -c '^idle$')" = "$nodes" ]; then return; fi
    sleep 0.5
  done
  tail -n 20 "$folder"/log/*.log >&2
  return 1
}

stop() {
  for file in "$folder"/run/slurmd-*.pid "$folder"/run/{slurmctld,munged}.pid; do
    [ ! -f "$file" ] || kill "$(cat "$file")" 2>/dev/null || true
  done
}
"$action"
