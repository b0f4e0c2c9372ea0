package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// deadAfter is how long a node must be silent until its volumes count as stuck:
// the default of the taints that evict its pods.
const deadAfter = 5 * time.Minute

// StuckVolume is a volume for one node only that a silent node holds while pods
// elsewhere wait for it.
type StuckVolume struct {
	Node string `json:"node"`
	// Silent is since when the node is not Ready.
	Silent time.Time `json:"silent"`
	// Alive: the kubelet itself says that it is not ready, so the machine runs.
	Alive bool `json:"alive,omitempty"`
	// OutOfService: the node has the out-of-service taint already.
	OutOfService bool   `json:"outOfService,omitempty"`
	Attachment   string `json:"volumeAttachment"`
	Volume       string `json:"persistentVolume"`
	Claim        string `json:"claim"`
	// Waiting are the pods that want it elsewhere, Held those on the node that
	// are deleted and can not end; both as namespace/name.
	Waiting []string `json:"waiting,omitempty"`
	Held    []string `json:"held,omitempty"`
}

// SilentNodes are the names of the nodes that have not been Ready for a while.
func SilentNodes(nodes []corev1.Node, now time.Time) []string {
	var out []string
	for i := range nodes {
		if _, _, silent := silence(&nodes[i], now); silent {
			out = append(out, nodes[i].Name)
		}
	}
	slices.Sort(out)
	return out
}

func silence(n *corev1.Node, now time.Time) (since time.Time, alive, silent bool) {
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			// The node controller sets Unknown when the kubelet's Lease is not
			// renewed; False is the kubelet's own word.
			return c.LastTransitionTime.UTC(), c.Status == corev1.ConditionFalse, now.Sub(c.LastTransitionTime.Time) > deadAfter
		}
	}
	return time.Time{}, false, false
}

// StuckVolumes finds them. Pods are those that are Pending, anywhere, and those
// of the silent nodes.
func StuckVolumes(nodes []corev1.Node, attachments []storagev1.VolumeAttachment, volumes []corev1.PersistentVolume, pods []corev1.Pod, now time.Time) []StuckVolume {
	silent := map[string]*corev1.Node{}
	for i := range nodes {
		if _, _, is := silence(&nodes[i], now); is {
			silent[nodes[i].Name] = &nodes[i]
		}
	}
	byName := map[string]*corev1.PersistentVolume{}
	for i := range volumes {
		byName[volumes[i].Name] = &volumes[i]
	}
	users := map[string][]*corev1.Pod{}
	for i := range pods {
		for _, claim := range claims(&pods[i]) {
			users[claim] = append(users[claim], &pods[i])
		}
	}
	var out []StuckVolume
	for _, a := range attachments {
		node := silent[a.Spec.NodeName]
		if node == nil || a.Spec.Source.PersistentVolumeName == nil {
			continue
		}
		pv := byName[*a.Spec.Source.PersistentVolumeName]
		if pv == nil || pv.Spec.ClaimRef == nil || !oneNodeOnly(pv) {
			continue
		}
		s := StuckVolume{Node: node.Name, Attachment: a.Name, Volume: pv.Name, Claim: pv.Spec.ClaimRef.Namespace + "/" + pv.Spec.ClaimRef.Name}
		s.Silent, s.Alive, _ = silence(node, now)
		s.OutOfService = slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService })
		for _, p := range users[s.Claim] {
			name := p.Namespace + "/" + p.Name
			switch {
			case p.Spec.NodeName == node.Name && p.DeletionTimestamp != nil:
				s.Held = append(s.Held, name)
			case p.Spec.NodeName != node.Name && p.Status.Phase == corev1.PodPending && p.DeletionTimestamp == nil:
				s.Waiting = append(s.Waiting, name)
			}
		}
		if len(s.Waiting)+len(s.Held) > 0 {
			slices.Sort(s.Waiting)
			slices.Sort(s.Held)
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b StuckVolume) int {
		return cmp.Or(strings.Compare(a.Node, b.Node), strings.Compare(a.Claim, b.Claim), strings.Compare(a.Attachment, b.Attachment))
	})
	return out
}

// oneNodeOnly: with any other mode the volume may be attached elsewhere as well.
func oneNodeOnly(pv *corev1.PersistentVolume) bool {
	for _, m := range pv.Spec.AccessModes {
		if m != corev1.ReadWriteOnce && m != corev1.ReadWriteOncePod {
			return false
		}
	}
	return len(pv.Spec.AccessModes) > 0
}

// claims are the pod's, as namespace/name.
func claims(p *corev1.Pod) []string {
	var out []string
	for _, v := range p.Spec.Volumes {
		switch {
		case v.PersistentVolumeClaim != nil:
			out = append(out, p.Namespace+"/"+v.PersistentVolumeClaim.ClaimName)
		case v.Ephemeral != nil:
			out = append(out, p.Namespace+"/"+p.Name+"-"+v.Name)
		}
	}
	return out
}

const outOfService = corev1.TaintNodeOutOfService + "=nodeshutdown:NoExecute"

// Says is one sentence about it, but for its subject.
func (s StuckVolume) Says(now time.Time) string {
	who := "waited for by " + few(s.Waiting, 3)
	if len(s.Waiting) == 0 {
		who = "held by " + few(s.Held, 3) + ", which can not end there"
	}
	return fmt.Sprintf("is attached to %s, not Ready for %s; %s", s.Node, age(now, s.Silent), who)
}

// WayOut is the safe way out, step by step, for all stuck volumes of one node. It
// is for a person: nothing here can know whether the machine is down, and a
// machine that only lost its network still writes.
func (s StuckVolume) WayOut() []string {
	switch {
	case s.Alive:
		return []string{
			"the kubelet itself says that it is not ready, so the machine runs and may write: do not use the out-of-service taint",
			"kubectl describe node " + s.Node,
		}
	case s.OutOfService:
		return []string{
			"the node has the out-of-service taint; its pods are deleted and its volumes detached within minutes",
			"when they run elsewhere and the machine is repaired: kubectl taint nodes " + s.Node + " " + outOfService + "-",
		}
	}
	return []string{
		"first make sure that " + s.Node + " is powered off (its management controller, hypervisor or cloud console): a machine that only lost its network still writes, and two writers destroy the file system",
		"only then: kubectl taint nodes " + s.Node + " " + outOfService,
		"when the pods run elsewhere and the machine is repaired: kubectl taint nodes " + s.Node + " " + outOfService + "-",
	}
}
