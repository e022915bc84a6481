# runc 1.3: NAME | WORDS of the failure | REASON
hooks/create-runs-its-three-kinds-in-order | poststart | up to 1.5.1 poststart hooks run in create
hooks/start-runs-start-container-before-the-process-and-poststart-after-it | poststart | up to 1.5.1 poststart hooks run in create
hooks/poststart-gets-the-state-running | status: String("created") | up to 1.5.1 poststart hooks run in create
hooks/a-failing-poststart-hook-ends-the-container | error running poststart hook | up to 1.5.1 poststart hooks run in create, and fail it
hooks/a-failing-start-container-hook-fails-start | ended with 0 | start does not wait for these hooks
detach/paused-stopped-and-unknown-are-refused-without-a-pid-file | | --ignore-paused is taken there, and waits for the thaw
pause/kill-works-on-a-paused-container | container not paused | resume of a stopped container in other words
checkpoint/and-restore-are-refused-at-once | | it can checkpoint
list/as-json | owner | state leaves the owner out, list does not
list/what-is-not-ours-is-passed-over | panic | a foreign state.json brings list down
flags/every-global-one-in-every-form | flag provided but not defined | it has no --log-level and no --cgroup-manager
flags/creates-and-runs-in-every-form | -no-subreaper | create has no --no-subreaper
state/one-object-with-the-fields-of-runc | String("") | state leaves the owner out
chaos/create-killed-at-any-moment | | a create that is killed may leave its cgroup
vm/kernel-parameters-and-sizes-are-as-asked | | it has no VM
chaos/start-and-exec-killed-at-any-moment | | by chance: delete --force gives up while the first process is still ending
create/twice-at-once-one-wins | | by chance: the loser may say "file exists"
start/twice-at-once-one-wins | | by chance: the loser may wait for ever
docker/network/a-vms-network-is-not-lent | it joins the network | its networks are the host's: any process may join
podman/rootless/limits-hold-without-a-cgroup-of-the-hosts | permission is granted for cgroups | the host's cgroup alone holds its limits
containerd/cni/a-port-is-forwarded-to-its-loopback | refused | nothing takes the connection first
docker/remapped/users-are-others-on-the-host | 1000000 | ids inside are mapped there
podman/mapped/users-are-others-on-the-host | 1000000 | ids inside are mapped there
