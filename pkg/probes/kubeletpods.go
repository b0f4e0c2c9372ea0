package probes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hosthygiene/agent/pkg/host"
)

// kubeletPod is a pod as the kubelet tells of it (GET /pods), as far as its
// name and its OOM scores go.
type kubeletPod struct {
	Metadata struct {
		Name       string `json:"name"`
		Namespace  string `json:"namespace"`
		UID        string `json:"uid"`
		Generation int64  `json:"generation"`
		// Annotations: only the two that mark static pods are kept.
		Annotations struct {
			Source string `json:"kubernetes.io/config.source"`
			Mirror string `json:"kubernetes.io/config.mirror"`
		} `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		Priority          *int64            `json:"priority"`
		PriorityClassName string            `json:"priorityClassName"`
		Resources         podResources      `json:"resources"`
		Containers        []kubeletPodsSpec `json:"containers"`
		InitContainers    []kubeletPodsSpec `json:"initContainers"`
	} `json:"spec"`
	Status struct {
		Containers     []containerStatus `json:"containerStatuses"`
		InitContainers []containerStatus `json:"initContainerStatuses"`
	} `json:"status"`
}

type kubeletPodsSpec struct {
	Name          string       `json:"name"`
	Resources     podResources `json:"resources"`
	RestartPolicy string       `json:"restartPolicy"`
}

type podResources struct {
	Requests struct {
		Memory looseString `json:"memory"`
	} `json:"requests"`
}

type containerStatus struct {
	Name        string `json:"name"`
	ContainerID string `json:"containerID"`
}

// memory is the requested memory in bytes, 0 when there is none.
func (r podResources) memory() (int64, error) {
	text := string(r.Requests.Memory)
	if text == "" {
		return 0, nil
	}
	if len(text) > 32 {
		return 0, errors.New("memory request: too long for a quantity")
	}
	q, err := resource.ParseQuantity(text)
	if err != nil || q.Sign() < 0 {
		return 0, fmt.Errorf("memory request: %q is no quantity", text)
	}
	const most = 1 << 50 // 1 PiB: products with 1000 stay in range
	return quantityUpTo(q, most), nil
}

// readKubeletPods asks the kubelet for its pods.
func readKubeletPods(ctx context.Context, v host.View) ([]kubeletPod, error) {
	var pods []kubeletPod
	err := v.KubeletAPI(ctx, "/pods", func(r io.Reader) (err error) {
		pods, err = parseKubeletPods(r)
		return err
	})
	return pods, err
}

// maxKubeletContainers bounds what is kept of pods, their containers and the
// states of these: a specification of a megabyte can name tens of thousands.
const maxKubeletContainers = 1 << 18

// parseKubeletPods reads what the scores depend on.
func parseKubeletPods(r io.Reader) ([]kubeletPod, error) {
	var pods []kubeletPod
	containers := 0
	err := eachPod(r, func(p kubeletPod) error {
		if containers += 1 + len(p.Spec.Containers) + len(p.Spec.InitContainers) + len(p.Status.Containers) + len(p.Status.InitContainers); containers > maxKubeletContainers {
			return errors.New("more containers than a node can run")
		}
		pods = append(pods, p)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return pods, nil
}

// eachPod decodes a PodList one pod at a time: a full node's is several
// megabytes, of which little is wanted. Who may make pods decides how long it is.
func eachPod[P any](r io.Reader, take func(P) error) error {
	part := &budget{r: r, left: maxAnswerPart}
	d := json.NewDecoder(part)
	bad := errors.New("the answer is not a list of pods")
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return bad
	}
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return bad
		}
		part.left = maxAnswerPart
		if key != "items" {
			var skipped json.RawMessage
			if err := d.Decode(&skipped); err != nil {
				return bad
			}
			continue
		}
		t, err := d.Token()
		if err != nil {
			return bad
		}
		if t == nil { // "items": null
			return nil
		}
		if t != json.Delim('[') {
			return bad
		}
		for d.More() {
			var p P
			part.left = maxAnswerPart
			if err := d.Decode(&p); err != nil {
				return bad
			}
			if err := take(p); err != nil {
				return err
			}
		}
		if _, err := d.Token(); err != nil { // cut off within the list
			return bad
		}
		return nil
	}
	if _, err := d.Token(); err != nil { // cut off before the list
		return bad
	}
	return nil
}

// systemCriticalPriority is SystemCriticalPriority of kubernetes
// pkg/apis/scheduling.
const systemCriticalPriority = 2_000_000_000

// nodeCritical follows IsNodeCriticalPod of kubernetes pkg/kubelet/types: the
// class alone does not make it, nor does being a static pod.
func (p kubeletPod) nodeCritical() bool {
	static := p.Metadata.Annotations.Source != "" && p.Metadata.Annotations.Source != "api"
	critical := static || p.Metadata.Annotations.Mirror != "" ||
		p.Spec.Priority != nil && *p.Spec.Priority >= systemCriticalPriority
	return critical && p.Spec.PriorityClassName == "system-node-critical"
}

// podScore is the oom_score_adj of one container.
type podScore struct {
	// Scores are the values kubelets of different versions give; the newest
	// kubelet's comes first.
	Scores []int
	// Why is the arithmetic behind the first.
	Why string
}

// Fixed scores of kubernetes pkg/kubelet/qos/policy.go.
const (
	guaranteedScore = -997
	bestEffortScore = 1000
	// sandboxScore is the pause container's (kubernetes#47938).
	sandboxScore = -998
)

// score computes the oom_score_adj of a container as GetContainerOOMScoreAdjust
// of kubernetes pkg/kubelet/qos does; capacity is the machine's memory in bytes.
// Kubelets before sidecars (1.29) and pod-level resources (1.34) knew counted
// neither, so their result passes too.
func (p kubeletPod) score(c kubeletPodsSpec, isInit bool, qos string, capacity int64) (podScore, error) {
	switch {
	case p.nodeCritical():
		return podScore{[]int{guaranteedScore}, "the pod is node-critical"}, nil
	case qos == qosGuaranteed:
		return podScore{[]int{guaranteedScore}, "the pod is Guaranteed"}, nil
	case qos == qosBestEffort:
		return podScore{[]int{bestEffortScore}, "the pod is BestEffort"}, nil
	case capacity <= 0:
		return podScore{}, errors.New("no memory capacity")
	}
	own, err := c.Resources.memory()
	if err != nil {
		return podScore{}, err
	}
	share, least, err := p.memoryShares()
	if err != nil {
		return podScore{}, err
	}
	formula := func(request int64) int {
		return int(1000 - 1000*request/capacity)
	}
	clamp := func(n int) int {
		if n == bestEffortScore {
			n--
		}
		return max(n, 1000+guaranteedScore)
	}
	plain := formula(own)
	newest, counted := formula(own+share), own+share
	if isInit && c.RestartPolicy == "Always" {
		if n := formula(least + share); n < newest {
			newest, counted = n, least+share
		}
	}
	s := podScore{
		Scores: []int{clamp(newest), clamp(plain)},
		Why:    fmt.Sprintf("1000 - 1000 x %d bytes requested / %d bytes of memory, within 3 and 999", counted, capacity),
	}
	return s, nil
}

// memoryShares returns the memory requested for the pod as a whole and not for
// one of its containers, as each of them counts it, and the least that a regular
// container requests.
func (p kubeletPod) memoryShares() (share, least int64, err error) {
	var all, sidecars, inits int64
	for i, c := range p.Spec.Containers {
		n, err := c.Resources.memory()
		if err != nil {
			return 0, 0, err
		}
		all += n
		if i == 0 || n < least {
			least = n
		}
	}
	// The pod's sum: regular containers and sidecars together, or the largest
	// moment of the initialisation (KEP-753).
	for _, c := range p.Spec.InitContainers {
		n, err := c.Resources.memory()
		if err != nil {
			return 0, 0, err
		}
		if c.RestartPolicy == "Always" {
			sidecars += n
			n = 0
		}
		inits = max(inits, sidecars+n)
	}
	whole, err := p.Spec.Resources.memory()
	containers := int64(len(p.Spec.Containers) + len(p.Spec.InitContainers))
	if err != nil || whole == 0 || containers == 0 {
		return 0, least, err
	}
	return (whole - max(all+sidecars, inits)) / containers, least, nil
}

// podNames maps what control groups know, pods' UIDs and containers' IDs, to
// names and scores.
type podNames struct {
	pods       map[string]*kubeletPod
	containers map[string]podContainer
}

type podContainer struct {
	pod  *kubeletPod
	spec *kubeletPodsSpec
	init bool
}

func (c podContainer) String() string {
	return c.pod.String() + "/" + c.spec.Name
}

// String is namespace/name.
func (p *kubeletPod) String() string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

func indexPods(pods []kubeletPod) podNames {
	names := podNames{pods: make(map[string]*kubeletPod, len(pods)), containers: map[string]podContainer{}}
	for i := range pods {
		p := &pods[i]
		names.pods[p.Metadata.UID] = p
		add := func(statuses []containerStatus, specs []kubeletPodsSpec, init bool) {
			for _, s := range statuses {
				_, id, ok := strings.Cut(s.ContainerID, "://")
				at := slices.IndexFunc(specs, func(c kubeletPodsSpec) bool { return c.Name == s.Name })
				if ok && id != "" && at >= 0 {
					names.containers[id] = podContainer{p, &specs[at], init}
				}
			}
		}
		add(p.Status.Containers, p.Spec.Containers, false)
		add(p.Status.InitContainers, p.Spec.InitContainers, true)
	}
	return names
}

// container finds out which container a control group is. A static pod has no
// status of its own here; with one container there is no doubt, once its
// sandbox is set aside.
func (n podNames) container(c podCgroup) (podContainer, bool) {
	if found, ok := n.containers[c.Container]; ok {
		return found, true
	}
	p := n.pods[c.UID]
	if p == nil || len(p.Status.Containers) > 0 || len(p.Spec.Containers) != 1 || len(p.Spec.InitContainers) > 0 {
		return podContainer{}, false
	}
	return podContainer{pod: p, spec: &p.Spec.Containers[0]}, true
}
