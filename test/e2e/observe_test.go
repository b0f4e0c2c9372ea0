//go:build cluster

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	observeOverlay = manifests + "kustomize/overlays/observe"
	unwantedFile   = "/etc/sysctl.d/99-hygiene-e2e.conf"
	// observeConfig asks for repairs that would be made at once.
	observeConfig = `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
interval: 3s
probes: {oom: {window: 2m}}
require:
  files: [{path: ` + unwantedFile + `, content: "# repaired\n"}]
  packages: [{name: hygiene-absent}]
  sysctls: {vm.swappiness: "62"}
remedies: {mode: enforce, allow: [files, packages, sysctls], failureBudget: 3}
`
)

// What docs/observe.md tells of is made on the node, all at once. The config
// does the rest.
const (
	blinded = spareDisk + `cd /tmp
cp /etc/chrony/chrony.conf e2e-chrony.conf; echo "cmdport 0" >>/etc/chrony/chrony.conf; systemctl restart chrony
mountpoint -q /spare || mount /dev/$d /spare; echo 1 >/sys/fs/ext4/$d/trigger_fs_error
modprobe dm-thin-pool
for f in e2e-meta e2e-data; do truncate -s 16M $f; losetup -f $f; done
dmsetup create e2e-pool --table "0 32768 thin-pool $(losetup -nO NAME -j e2e-meta) $(losetup -nO NAME -j e2e-data) 128 0"
dmsetup message e2e-pool 0 "create_thin 0"
dmsetup create e2e-thin --table "0 30720 thin /dev/mapper/e2e-pool 0"
dd if=/dev/zero of=/dev/mapper/e2e-thin bs=1M count=15 oflag=direct status=none
systemctl stop multipathd.socket multipathd.service iscsid.socket iscsid.service
dmsetup message mpatha 0 fail_path $(cat /sys/block/$(ls /sys/block/$(basename "$(readlink -f /dev/mapper/mpatha)")/slaves | head -n 1)/dev)
touch -d "30 days ago" /run/reboot-required
cd /var/tmp # the other may be a tmpfs, on which nothing swaps
install -m 600 /dev/null e2e-swap; dd if=/dev/zero of=e2e-swap bs=1M count=2 status=none; mkswap e2e-swap >/dev/null; swapon e2e-swap
`
	// happened is what is told for a while after it; it is made anew before each
	// look.
	happened = `systemd-run --quiet --wait --collect -p MemoryMax=20M -p MemorySwapMax=0 -p OOMPolicy=continue tail /dev/zero || true
systemd-run --quiet --wait --collect -p TasksMax=2 sh -c "sleep 0.1 & sleep 0.1 & sleep 0.1 & wait" || true
`

	unblinded = spareDisk + `cd /tmp
if test -e /var/tmp/e2e-swap; then swapoff /var/tmp/e2e-swap || true; rm -f /var/tmp/e2e-swap; fi
rm -f /run/reboot-required e2e-config.yaml
if test -e e2e-chrony.conf; then mv e2e-chrony.conf /etc/chrony/chrony.conf; systemctl restart chrony; fi
if mountpoint -q /spare; then umount /spare; e2fsck -fy /dev/$d >/dev/null || true; fi
for m in e2e-thin e2e-pool; do dmsetup remove $m 2>/dev/null || true; done
for f in e2e-meta e2e-data; do losetup -j $f | cut -d: -f1 | xargs -r losetup -d; rm -f $f; done
for p in $(ls /sys/block/$(basename "$(readlink -f /dev/mapper/mpatha)")/slaves); do dmsetup message mpatha 0 reinstate_path $(cat /sys/block/$p/dev); done
systemctl start multipathd.service iscsid.socket iscsid.service`
)

// inPod runs the agent's own program once more in a pod.
func (w *world) inPod(t *testing.T, pod string, args ...string) (string, error) {
	out, err := w.ControlPlane.KubectlCommand(w.CleanupContext(t), append([]string{"exec", "-n", rigtest.Namespace, pod, "--", "/agent"}, args...)...).CombinedOutput()
	return string(out), err
}

// onlyObserves installs the overlay of that name: it reports as the other does,
// repairs nothing whatever it is asked, holds the privileges that are listed and
// no others, and tells what it can not see.
func (w *world) onlyObserves(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	t.Cleanup(func() { w.remove(t) })
	before := w.mark()
	w.Kubectl(t, "apply", "-f", manifests+"kustomize/base/namespace.yaml")
	w.WriteConfig(t, observeConfig)
	w.Kubectl(t, "apply", "-k", observeOverlay)
	t.Cleanup(func() {
		if _, err := w.TryGuest(w.CleanupContext(t), unblinded); err != nil {
			t.Error(err)
		}
	})
	w.PodReady(t, 0)
	w.Spent("observing agent ready")
	p, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}

	// CAP_SYS_PTRACE is 19, CAP_SYSLOG 34 (capability.h).
	status := w.Guest(t, rigtest.AgentPID+`grep -E '^(CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs|Seccomp):' /proc/$pid/status`)
	want := map[string]string{"CapPrm": "0000000400080000", "CapEff": "0000000400080000", "CapBnd": "0000000400080000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"}
	got := map[string]string{}
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		got[key] = strings.TrimSpace(value)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the agent's process (-want +got): %s", d)
	}

	asked := map[string]string{"ServiceProblem": "FileMissing", "PackageProblem": "PackageMissing", "KernelProblem": "SysctlDiffers"}
	w.Await(t, "the conditions", func() error {
		all := w.all()
		var errs []error
		for _, kind := range slices.Concat(kinds(), []string{"KernelProblem"}) {
			if reason, ok := asked[kind]; ok {
				errs = append(errs, all.Is(kind, corev1.ConditionTrue, reason))
			} else {
				errs = append(errs, all.Is(kind, corev1.ConditionFalse, "NoProblem"))
			}
		}
		return errors.Join(errs...)
	})
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "RemediesNotAllowed") })
	w.Spent("observing agent's first conditions")
	for _, line := range []string{"apply --config=/etc/host-hygiene/config.yaml", "run --allow-remedies"} {
		if out, err := w.inPod(t, p.Name, strings.Fields(line)...); err == nil || !strings.Contains(out, "only observes") {
			t.Errorf("agent %s in the pod: %v: %s", line, err, out)
		}
	}

	w.Guest(t, blinded+"cat >/tmp/e2e-config.yaml <<'END'\n"+observeConfig+"END\n")
	node, pod := map[string]seen{}, map[string]seen{}
	for probe, s := range sights() {
		node[probe], pod[probe] = s.node, s.pod
	}
	w.Await(t, "the node to see its faults", func() error {
		out, err := w.TryGuest(t.Context(), happened+guestAgent+" check --config=/tmp/e2e-config.yaml -o json || test $? -ne 2")
		if err != nil {
			return err
		}
		return saw(out, node)
	})
	w.Await(t, "the pod to see what it can", func() error { return w.podSaw(t, p.Name, pod) })
	w.Await(t, "the conditions to tell what is not seen", func() error {
		return errors.Join(w.is("TimeProblem", corev1.ConditionUnknown)(), w.is("MultipathProblem", corev1.ConditionTrue, "MultipathdDown")(),
			w.is("DiskProblem", corev1.ConditionTrue, "FilesystemErrors")())
	})
	w.Guest(t, "! test -e "+unwantedFile+`; test $(cat /proc/sys/vm/swappiness) != 62
! test -e /sys/fs/cgroup/host-hygiene; ! systemctl list-units --all --plain 'host-hygiene-*' | grep host-hygiene
test -z "$(ls -A /var/lib/host-hygiene 2>/dev/null)"`)
	w.Spent("observed")
}

// podSaw lets the agent check in a pod and compares what it says.
func (w *world) podSaw(t *testing.T, pod string, want map[string]seen) error {
	out, _ := w.inPod(t, pod, "check", "--config=/etc/host-hygiene/config.yaml", "-o", "json")
	return saw(out, want)
}

// capabilities proves by elimination that each one listed is needed, and that more
// would be of no use: copies of the observing pod that differ in one thing.
func (w *world) capabilities(t *testing.T) {
	w.onlyObserves(t) // and leaves the node blinded until this test ends
	own, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range variants() {
		t.Run(v.name, func(t *testing.T) {
			pod := corev1.Pod{Spec: *own.Spec.DeepCopy()}
			pod.APIVersion, pod.Kind, pod.Name, pod.Namespace = "v1", "Pod", "e2e-"+v.name, rigtest.Namespace
			pod.Spec.RestartPolicy = corev1.RestartPolicyNever
			c := &pod.Spec.Containers[0]
			c.Args, c.Ports, c.StartupProbe, c.LivenessProbe, c.ReadinessProbe = []string{"check", "--watch", "--every=24h"}, nil, nil, nil, nil
			v.change(c.SecurityContext)
			// Its token is the kubelet's to give.
			pod.Spec.Volumes = slices.DeleteFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Projected != nil })
			c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return strings.HasPrefix(m.Name, "kube-api-access") })
			w.Apply(t, pod)
			t.Cleanup(func() { w.Kubectl(t, "delete", "-n", rigtest.Namespace, "pod", pod.Name, "--grace-period=1") })
			if v.refuses != "" {
				w.Await(t, "its refusal", func() error {
					out, err := w.ControlPlane.Kubectl(t.Context(), "logs", "-n", rigtest.Namespace, pod.Name)
					if err == nil && !strings.Contains(out, v.refuses) {
						err = fmt.Errorf("it says %q", out)
					}
					return err
				})
				return
			}
			w.Guest(t, happened)
			w.Await(t, "what it sees", func() error { return w.podSaw(t, pod.Name, v.sees()) })
		})
	}
}
