# a3s-box: NAME | WORDS of the failure | REASON. What it refuses of what runtimes give, in the words of its refusal. Those
# of config.json that no runtime takes are wishes of their own (src/wishes/bad_configs.rs), with their texts.
create/preserved-descriptors-reach-the-process | --preserve-fds 1: descriptors cannot cross into a VM | so it is
devices/of-the-host-are-made | linux.devices: /dev/mine: the guest kernel has no device 195:0, and the host's cannot be passed into the VM | hardware stays with the host
mounts/a-bound-fifo-reaches-the-host | to /tmp/fifo: a FIFO cannot reach into a VM | its two ends would be in two kernels
mounts/a-shared-bind-brings-mounts-back-to-the-host | : a guest's mounts cannot propagate to the host | the guest's mounts are another kernel's
mounts/root-propagation-may-be-shared | : a guest's mounts cannot propagate to the host | the guest's mounts are another kernel's
namespaces/pid-given-by-path-is-joined | linux.namespaces: pid by path is not supported | the guest's processes are another kernel's
seccomp/notify-hands-the-listener-over | the filter runs in the guest's kernel, no descriptor of it can cross to the host | so it is
update/memory-may-grow | cannot grow | a VM's RAM is as large as it was when it began
cri/runc/a-container-starts-again-beside-the-others | | by chance: containerd may note a short program's start after its end
