//go:build cluster

package e2e

import (
	"encoding/json"
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
	// observeConfig asks for a repair that would be made at once.
	unwantedFile  = "/etc/sysctl.d/99-hygiene-e2e.conf"
	observeConfig = `apiVersion: hosthygiene.io/v1alpha1
kind: AgentConfig
interval: 3s
require: {files: [{path: ` + unwantedFile + `, content: "# repaired\n"}]}
remedies: {mode: enforce, allow: [files, packages, units], failureBudget: 3}
`
)

// What docs/observe.md says is lost is made on the node, all at once: a thin pool
// and a path that only device-mapper's ioctl knows, what only chronyd's socket
// tells, and an error of a file system that stands in the kernel's log.
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
systemctl stop multipathd.socket multipathd.service
dmsetup message mpatha 0 fail_path $(cat /sys/block/$(ls /sys/block/$(basename "$(readlink -f /dev/mapper/mpatha)")/slaves | head -n 1)/dev)`

	unblinded = spareDisk + `cd /tmp
if test -e e2e-chrony.conf; then mv e2e-chrony.conf /etc/chrony/chrony.conf; systemctl restart chrony; fi
if mountpoint -q /spare; then umount /spare; e2fsck -fy /dev/$d >/dev/null || true; fi
for m in e2e-thin e2e-pool; do dmsetup remove $m 2>/dev/null || true; done
for f in e2e-meta e2e-data; do losetup -j $f | cut -d: -f1 | xargs -r losetup -d; rm -f $f; done
for p in $(ls /sys/block/$(basename "$(readlink -f /dev/mapper/mpatha)")/slaves); do dmsetup message mpatha 0 reinstate_path $(cat /sys/block/$p/dev); done
systemctl start multipathd.service`
)

// seen is what "agent check" says of a probe.
type seen struct {
	status  string
	reasons []string
	// lacks is in the error, when there is one.
	lacks string
}

// The probes that are blinded, as the node itself sees them and as the pods do.
func seenOnNode() map[string]seen {
	return map[string]seen{
		"time":      {status: "OK"},
		"disks":     {status: "Problem", reasons: []string{"FilesystemErrors", "ThinPoolNearFull"}},
		"multipath": {status: "Problem", reasons: []string{"MultipathdDown", "PathsDegraded"}},
		"iscsi":     {status: "OK"}, "pids": {status: "OK"}, "oom": {status: "OK"},
		"packages": {status: "OK"}, "units": {status: "OK"}, "kernel": {status: "NotApplicable"},
	}
}

func seenObserving() map[string]seen {
	all := seenOnNode()
	all["time"] = seen{status: "Unknown", lacks: "/run/chrony/chronyd.sock"}
	all["disks"] = seen{status: "Problem", reasons: []string{"FilesystemErrors"}, lacks: "thin pools: open /dev/mapper/control: operation not permitted"}
	all["multipath"] = seen{status: "Problem", reasons: []string{"MultipathdDown"}, lacks: "which paths the kernel uses, device-mapper ioctl: open /dev/mapper/control: operation not permitted"}
	return all
}

// checked parses "agent check -o json".
func checked(out string) (map[string]seen, error) {
	var r struct {
		Probes []struct {
			Name, Status, Error string
			Findings            []struct{ Reason string }
		}
	}
	// kubectl adds a line about the exit code, which says that there is a finding.
	if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil {
		return nil, fmt.Errorf("%w: %.300s", err, out)
	}
	all := map[string]seen{}
	for _, p := range r.Probes {
		s := seen{status: p.Status, lacks: p.Error}
		for _, f := range p.Findings {
			s.reasons = append(s.reasons, f.Reason)
		}
		slices.Sort(s.reasons)
		all[p.Name] = s
	}
	return all, nil
}

// saw compares what was seen with what was to be seen.
func saw(out string, want map[string]seen) error {
	got, err := checked(out)
	if err != nil {
		return err
	}
	var errs []error
	for name, w := range want {
		g := got[name]
		if g.status != w.status || !slices.Equal(g.reasons, w.reasons) || (g.lacks == "") != (w.lacks == "") || !strings.Contains(g.lacks, w.lacks) {
			errs = append(errs, fmt.Errorf("%s: want %+v, got %+v", name, w, g))
		}
	}
	if len(got) != len(want) {
		errs = append(errs, fmt.Errorf("%d probes", len(got)))
	}
	return errors.Join(errs...)
}

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

	w.Await(t, "the conditions", func() error {
		all := w.all()
		errs := []error{all.Is("ServiceProblem", corev1.ConditionTrue, "FileMissing")}
		for _, kind := range kinds() {
			errs = append(errs, all.Is(kind, corev1.ConditionFalse, "NoProblem"))
		}
		return errors.Join(errs...)
	})
	w.Await(t, "the Event", func() error { return w.event(before, corev1.EventTypeWarning, "RemediesNotAllowed") })
	for _, line := range []string{"apply --config=/etc/host-hygiene/config.yaml", "apply --allow files", "rollback --all", "plan --simulate", "run --allow-remedies"} {
		if out, err := w.inPod(t, p.Name, strings.Fields(line)...); err == nil || !strings.Contains(out, "only observes") {
			t.Errorf("agent %s in the pod: %v: %s", line, err, out)
		}
	}

	w.Guest(t, blinded)
	w.Await(t, "the node to see its faults", func() error {
		out, err := w.TryGuest(t.Context(), guestAgent+" check -o json || test $? -ne 2")
		if err != nil {
			return err
		}
		return saw(out, seenOnNode())
	})
	w.Await(t, "the pod to see what it can", func() error {
		out, _ := w.inPod(t, p.Name, "check", "-o", "json")
		return saw(out, seenObserving())
	})
	w.Await(t, "the conditions to tell what is not seen", func() error {
		return errors.Join(w.is("TimeProblem", corev1.ConditionUnknown)(), w.is("MultipathProblem", corev1.ConditionTrue, "MultipathdDown")(),
			w.is("DiskProblem", corev1.ConditionTrue, "FilesystemErrors")())
	})
	w.Guest(t, "! test -e "+unwantedFile+"; ! test -e /sys/fs/cgroup/host-hygiene; ! systemctl list-units --all --plain 'host-hygiene-*' | grep host-hygiene; test -z \"$(ls -A /var/lib/host-hygiene 2>/dev/null)\"")
	w.Spent("observed")
}

// capabilities proves by elimination that each one listed is needed, and that the
// confinement that is left off has to be: copies of the observing pod that differ
// in one thing.
func (w *world) capabilities(t *testing.T) {
	w.onlyObserves(t) // and leaves the node blinded until this test ends
	own, err := w.Pod(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	withoutSyslog := seenObserving()
	withoutSyslog["disks"] = seen{status: "Problem", reasons: []string{"FilesystemErrors"}, lacks: "syslog(2): operation not permitted"}
	const invisible = "PID 1 may not be looked at from this container"
	for name, v := range map[string]struct {
		change func(*corev1.SecurityContext)
		want   map[string]seen // nil: it does not start
	}{
		"as-it-is":        {func(*corev1.SecurityContext) {}, seenObserving()},
		"without-syslog":  {func(s *corev1.SecurityContext) { s.Capabilities.Add = []corev1.Capability{"SYS_PTRACE"} }, withoutSyslog},
		"without-ptrace":  {func(s *corev1.SecurityContext) { s.Capabilities.Add = []corev1.Capability{"SYSLOG"} }, nil},
		"with-dac-read":   {func(s *corev1.SecurityContext) { s.Capabilities.Add = append(s.Capabilities.Add, "DAC_READ_SEARCH") }, seenObserving()},
		"without-seccomp": {func(s *corev1.SecurityContext) { s.SeccompProfile.Type = corev1.SeccompProfileTypeUnconfined }, seenObserving()},
		"with-all-but-priv": {func(s *corev1.SecurityContext) {
			s.Capabilities.Add = []corev1.Capability{"ALL"}
			s.AllowPrivilegeEscalation = nil
		}, seenObserving()},
	} {
		t.Run(name, func(t *testing.T) {
			pod := corev1.Pod{Spec: *own.Spec.DeepCopy()}
			pod.APIVersion, pod.Kind, pod.Name, pod.Namespace = "v1", "Pod", "e2e-"+name, rigtest.Namespace
			pod.Spec.RestartPolicy = corev1.RestartPolicyNever
			c := &pod.Spec.Containers[0]
			c.Args, c.Ports, c.LivenessProbe, c.ReadinessProbe = []string{"check", "--watch", "--every=24h"}, nil, nil, nil
			v.change(c.SecurityContext)
			// Its token is the kubelet's to give.
			pod.Spec.Volumes = slices.DeleteFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Projected != nil })
			c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool { return strings.HasPrefix(m.Name, "kube-api-access") })
			w.Apply(t, pod)
			t.Cleanup(func() { w.Kubectl(t, "delete", "-n", rigtest.Namespace, "pod", pod.Name, "--grace-period=1") })
			if v.want == nil {
				w.Await(t, "its refusal", func() error {
					out, err := w.ControlPlane.Kubectl(t.Context(), "logs", "-n", rigtest.Namespace, pod.Name)
					if err == nil && !strings.Contains(out, invisible) {
						err = fmt.Errorf("it says %q", out)
					}
					return err
				})
				return
			}
			w.Await(t, "what it sees", func() error {
				out, _ := w.inPod(t, pod.Name, "check", "-o", "json")
				return saw(out, v.want)
			})
		})
	}
}
