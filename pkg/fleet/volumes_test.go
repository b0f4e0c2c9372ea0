package fleet

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// objects are whatever the checks look at.
type objects struct {
	Nodes       []corev1.Node
	Pods        []corev1.Pod
	Attachments []storagev1.VolumeAttachment
	Volumes     []corev1.PersistentVolume
	Namespaces  []corev1.Namespace
	Servers     []APIServer
	CRDs        []CRD
	Migrations  []Migration
	Dying       []Dying
	Deprecated  []DeprecatedAPI
	Target      string
}

func silent(name, status string, since time.Duration) corev1.Node {
	n := node(name)
	n.Status.Conditions[0].Status = corev1.ConditionStatus(status)
	n.Status.Conditions[0].LastTransitionTime = ago(since)
	return n
}

func attached(volume, node string) storagev1.VolumeAttachment {
	a := storagev1.VolumeAttachment{}
	a.Name = "csi-" + volume
	a.Spec.NodeName, a.Spec.Source.PersistentVolumeName = node, &volume
	a.Status.Attached = true
	return a
}

func volume(name, claim string, modes ...corev1.PersistentVolumeAccessMode) corev1.PersistentVolume {
	v := corev1.PersistentVolume{}
	v.Name = name
	v.Spec.AccessModes = modes
	v.Spec.ClaimRef = &corev1.ObjectReference{Namespace: "db", Name: claim}
	return v
}

func user(name, node, claim string, phase corev1.PodPhase, deleted bool) corev1.Pod {
	p := corev1.Pod{}
	p.Namespace, p.Name = "db", name
	p.Spec.NodeName = node
	p.Status.Phase = phase
	p.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}}
	if deleted {
		at := ago(4 * time.Minute)
		p.DeletionTimestamp = &at
	}
	return p
}

func TestStuckVolumes(t *testing.T) {
	dead := silent("dead", "Unknown", 9*time.Minute)
	nodes := []corev1.Node{dead, silent("short", "Unknown", 2*time.Minute), silent("sick", "False", time.Hour), node("fine")}
	attachments := []storagev1.VolumeAttachment{
		attached("pv-moved", "dead"), attached("pv-set", "dead"), attached("pv-shared", "dead"), attached("pv-idle", "dead"), attached("pv-eph", "dead"),
		attached("pv-short", "short"), attached("pv-sick", "sick"), attached("pv-fine", "fine"), attached("pv-gone", "dead"),
	}
	inline := storagev1.VolumeAttachment{}
	inline.Spec.NodeName = "dead"
	attachments = append(attachments, inline)
	volumes := []corev1.PersistentVolume{
		volume("pv-moved", "moved", corev1.ReadWriteOnce), volume("pv-set", "set", corev1.ReadWriteOncePod), volume("pv-shared", "shared", corev1.ReadWriteOnce, corev1.ReadWriteMany),
		volume("pv-idle", "idle", corev1.ReadWriteOnce), volume("pv-eph", "web-scratch", corev1.ReadWriteOnce), volume("pv-short", "short", corev1.ReadWriteOnce),
		volume("pv-sick", "sick", corev1.ReadWriteOnce), volume("pv-fine", "fine", corev1.ReadWriteOnce),
	}
	ephemeral := user("web", "", "", corev1.PodPending, false)
	ephemeral.Spec.Volumes = []corev1.Volume{{Name: "scratch", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}}}
	pods := []corev1.Pod{
		user("moved-2", "fine", "moved", corev1.PodPending, false), user("moved-1", "dead", "moved", corev1.PodRunning, true),
		user("set-0", "dead", "set", corev1.PodRunning, true), // a StatefulSet makes no other while it is there
		user("shared-2", "fine", "shared", corev1.PodPending, false), user("idle-1", "dead", "idle", corev1.PodRunning, false), ephemeral,
		user("short-2", "fine", "short", corev1.PodPending, false), user("sick-2", "fine", "sick", corev1.PodPending, false), user("fine-2", "", "fine", corev1.PodPending, false),
	}
	got := StuckVolumes(nodes, attachments, volumes, pods, now)
	since := now.Add(-9 * time.Minute)
	want := []StuckVolume{
		{Node: "dead", Silent: since, Attachment: "csi-pv-moved", Volume: "pv-moved", Claim: "db/moved", Waiting: []string{"db/moved-2"}, Held: []string{"db/moved-1"}},
		{Node: "dead", Silent: since, Attachment: "csi-pv-set", Volume: "pv-set", Claim: "db/set", Held: []string{"db/set-0"}},
		{Node: "dead", Silent: since, Attachment: "csi-pv-eph", Volume: "pv-eph", Claim: "db/web-scratch", Waiting: []string{"db/web"}},
		{Node: "sick", Silent: now.Add(-time.Hour), Alive: true, Attachment: "csi-pv-sick", Volume: "pv-sick", Claim: "db/sick", Waiting: []string{"db/sick-2"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatal(diff)
	}
	if diff := cmp.Diff([]string{"dead", "sick"}, SilentNodes(nodes, now)); diff != "" {
		t.Error(diff)
	}

	var b strings.Builder
	r := NewReport(nodes, nil, now)
	r.StuckVolumes = got
	if err := r.WriteTable(&b, Style{}); err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(b.String(), "\n\n")
	const out = `Volumes stuck on nodes that are not Ready
  db/moved (pv-moved) is attached to dead, not Ready for 9m; waited for by db/moved-2
  db/set (pv-set) is attached to dead, not Ready for 9m; held by db/set-0, which can not end there
  db/web-scratch (pv-eph) is attached to dead, not Ready for 9m; waited for by db/web
    1. first make sure that dead is powered off (its management controller, hypervisor or cloud console): a machine that only lost its network still writes, and two writers destroy the file system
    2. only then: kubectl taint nodes dead node.kubernetes.io/out-of-service=nodeshutdown:NoExecute
    3. when the pods run elsewhere and the machine is repaired: kubectl taint nodes dead node.kubernetes.io/out-of-service=nodeshutdown:NoExecute-
  db/sick (pv-sick) is attached to sick, not Ready for 60m; waited for by db/sick-2
    1. the kubelet itself says that it is not ready, so the machine runs and may write: do not use the out-of-service taint
    2. kubectl describe node sick
`
	if diff := cmp.Diff(out, text[:strings.Index(text, "\n\n")+1]); diff != "" {
		t.Error(diff)
	}

	// A kubelet that says so itself runs: nobody may be told to use the taint.
	for _, step := range got[3].WayOut() {
		if strings.Contains(step, "kubectl taint") {
			t.Errorf("a machine that runs: %s", step)
		}
	}
	nodes[0].Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeOutOfService, Effect: corev1.TaintEffectNoExecute}}
	tainted := StuckVolumes(nodes, attachments, volumes, pods, now)[0]
	if !tainted.OutOfService || strings.Contains(strings.Join(tainted.WayOut(), "\n"), "only then") {
		t.Errorf("%+v: %v", tainted, tainted.WayOut())
	}
}
