# crun 1.28: NAME | WORDS of the failure | REASON
bad-input/an-unknown-id-for-every-verb | no ["container does not exist"] | other words, with the id in them
checkpoint/and-restore-are-refused-at-once | | it can checkpoint
create/failure-leaves-no-pid-file | No such file or directory | other words: the C library's, in capitals
create/the-same-id-twice-is-refused-and-harmless | already exists | other words, with the id in them
delete/a-running-container-is-refused-and-unharmed | is not in `created` or `stopped` state | other words
delete/leaves-nothing | cannot open directory | other words for an unknown id
detach/paused-stopped-and-unknown-are-refused-without-a-pid-file | ended with 1, not 255 | every failure is 1
exec/a-missing-program-is-an-error-in-runcs-words | ended with 1, not 255 | every failure is 1
exec/a-stopped-container-is-refused | ended with 1, not 255 | every failure is 1
flags/creates-and-runs-in-every-form | -no-subreaper | long flags need two dashes
flags/every-global-one-in-every-form | invalid option | long flags need two dashes
hooks/a-failing-create-container-hook-fails-create | error executing hook | other words, twice
hooks/a-failing-poststart-hook-ends-the-container | error executing hook | other words, and the hook's status
hooks/a-failing-prestart-hook-fails-create | error executing hook | other words
hooks/a-failing-start-container-hook-fails-start | ended with 0 | start does not wait for these hooks
hooks/a-timeout-is-kept | timeout expired | other words, on two lines
hooks/start-container-runs-in-the-container-with-its-processs-environment | bundle: String("/") | the state has another bundle
hooks/start-runs-start-container-before-the-process-and-poststart-after-it | | start does not wait for the process: the order is by chance
hooks/those-of-create-get-the-state-creating | status: String("created") | the state is created already
kill/a-stopped-container-is-not-running | process not running | other words
kill/names-and-numbers-in-every-form | unknown signal `term` | names are in capitals
list/as-json | [\n | on several lines, without rootfs and annotations
list/what-is-not-ours-is-passed-over | Not a directory | a file among the states makes list fail
log/a-failure-is-one-json-line | 5, not 1 | a failure may be several lines
log/failed-exec-is-logged-too | ended with 1, not 255 | every failure is 1
pause/exec-is-refused | ended with 1, not 255 | every failure is 1
pause/kill-works-on-a-paused-container | is not running | other words
process/rlimits-are-as-asked | not "512\n1024" | exec does not take the container's limits
start/a-second-start-is-refused | exec.fifo | other words
start/a-stopped-container-is-refused | is not running | other words
streams/of-the-caller-may-be-closed | 139, not 5 | exec crashes where streams are closed
version/in-runcs-form | crun version 1.28 | a version of two numbers
chaos/create-killed-at-any-moment | | a create that is killed may leave its cgroup
detach/nothing-of-the-callers-is-held-but-the-streams | | by chance: descriptors stay open until the program runs
vm/kernel-parameters-and-sizes-are-as-asked | | it has no VM
terminal/execs-own-is-raw-and-as-before-in-the-end | ended with 1, not 255 | every failure is 1
terminal/of-the-container-itself | use --console-socket with create | other words
start/twice-at-once-one-wins | exec.fifo | other words
seccomp/both-* | read pipe failed | exec cannot stand a filter that traps umask
seccomp/errno-* | read pipe failed | exec cannot stand a filter that traps umask
seccomp/kill-* | read pipe failed | exec cannot stand a filter that traps umask
seccomp/arguments-* | read pipe failed | exec cannot stand a filter that traps umask
seccomp/dockers-* | newer than the profile: 1 | a call that is newer than the profile is no ENOSYS
create/a-pidfd-is-sent-to-its-socket | | it has no --pidfd-socket
pidfd/the-containers-goes-to-the-socket | | it has no --pidfd-socket
detach/ends-when-the-vm-does | ended with 1, not 255 | every failure is 1
