#!/bin/sh
# Two machines on one: network namespaces joined by a cable, an `accelerate launch` in each. Prints what the first one's end
# of the cable sent and received.
#
#   unshare --map-root-user --net tests/two_machines.sh PYTHON FLAGS_OF_ACCELERATE_LAUNCH… --main_process_ip 10.99.0.1 SCRIPT…
set -e
python=$1
shift
unshare --net sleep infinity &
other=$!
trap 'kill $other' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/$$/ns/net)" ]; do sleep 0.02; done
in_other="nsenter --target $other --net"
ip link add cable0 type veth peer name cable1 netns $other
ip address add 10.99.0.1/24 dev cable0
$in_other ip address add 10.99.0.2/24 dev cable1
for device in lo cable0; do ip link set $device up; done
for device in lo cable1; do $in_other ip link set $device up; done
GLOO_SOCKET_IFNAME=cable1 $in_other "$python" -m accelerate.commands.launch --num_machines 2 --machine_rank 1 "$@" &
second=$!
GLOO_SOCKET_IFNAME=cable0 "$python" -m accelerate.commands.launch --num_machines 2 --machine_rank 0 "$@"
wait $second
ip -s -j link show cable0
