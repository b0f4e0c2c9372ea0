// Package probes holds the checks. Each probe is one file, read top to bottom:
// its rules, its settings, its check, its parsers. A probe reads the host
// through [host.View] only and returns findings; it changes nothing, logs
// nothing and retries nothing.
package probes

import (
	"context"
	"maps"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// ConditionPrefix marks the Node conditions that are ours.
const ConditionPrefix = "hosthygiene.io/"

// Probe is one check of the host.
type Probe interface {
	// Name is the key under `probes:` in the config and the metric label.
	Name() string
	// Condition is the Node condition type the probe publishes.
	Condition() string
	// Rules lists every reason the probe can give.
	Rules() []finding.Rule
	// General returns the settings every probe has; [Common] provides it.
	General() Common
	// Rarely: nearly all that changes its answer is announced, and the rest comes
	// about within hours, such as the age of a certificate. [Common] says no.
	Rarely() bool
	// Wakes is what makes the probe look before its interval is over.
	Wakes(r Require) Wakes
	// Validate returns a FieldError for every impossible setting.
	Validate() error
	// Check makes one pass. The error says what could not be checked and may
	// come beside findings.
	Check(ctx context.Context, in Input) (finding.Result, error)
}

// Input is what a pass is given besides the probe's own settings.
type Input struct {
	Host host.View
	// Now is the wall clock at the start of the pass.
	Now time.Time
	// Require is what this host must have.
	Require Require
	// Cluster is the cluster the host is a node of; nil where the agent is not
	// in one, or not yet told of it.
	Cluster Cluster
	// Memory is what this probe remembered on earlier passes; never nil.
	Memory *Memory
}

// Cluster is what a probe can know of the cluster beyond this host: what the agent
// is told of its own Node anyway, and the one question every account may ask.
type Cluster interface {
	// Node is this node as it was last seen; ok is false when it never was.
	Node() (node Node, ok bool)
	// Version is that of the API server, "v1.36.3". It may be asked for in every
	// pass: the answer is kept for as long as it holds.
	Version(ctx context.Context) (string, error)
	// Attachment asks for a VolumeAttachment by its name; ok is false where there
	// is none.
	Attachment(ctx context.Context, name string) (a Attachment, ok bool, err error)
	// Claim asks which claim, "namespace/name", a PersistentVolume is bound to;
	// empty where it is not, or is not there.
	Claim(ctx context.Context, volume string) (string, error)
}

// Node is the part of the node's own Node object that probes judge. It is shared
// and must not be changed.
type Node struct {
	Name string
	// KubeletVersion is what the kubelet said when it last started, "v1.36.3".
	KubeletVersion string
	Conditions     []NodeCondition
	// VolumesAttached is what the attach/detach controller has attached to the
	// node, VolumesInUse what the kubelet wants attached or has mounted, both by
	// the unique names of volumes, "kubernetes.io/csi/DRIVER^HANDLE".
	VolumesAttached, VolumesInUse []string
}

// Attachment is a VolumeAttachment (storage.k8s.io/v1), as far as it is judged.
type Attachment struct {
	// Volume is the PersistentVolume; empty for one that stands in a pod.
	Volume   string
	Attached bool
	// Deleting: the cluster wants it detached.
	Deleting bool
	// DetachError is what the driver said when it could not detach it.
	DetachError string
	// Metadata is what the driver's controller tells the driver on the node.
	Metadata map[string]string
}

// NodeCondition is a condition of the Node, of whoever wrote it.
type NodeCondition struct {
	Type, Status string
	// Heartbeat is when its owner last confirmed it; zero when never.
	Heartbeat time.Time
}

// Memory is what one probe remembers from pass to pass: how long something has
// lasted and the best that was ever seen. It is lost when the agent restarts,
// so it may only delay or refine a finding, never make one. It is not safe for
// concurrent use: a probe never overlaps itself.
type Memory struct {
	since, seenSince map[string]time.Time
	best             map[string]int64
	kept             map[string]any
}

// NewMemory returns an empty memory.
func NewMemory() *Memory {
	return &Memory{since: map[string]time.Time{}, seenSince: map[string]time.Time{}, best: map[string]int64{}}
}

// Begin starts a pass: what the last pass did not mention has ended.
func (m *Memory) Begin() {
	m.since, m.seenSince = m.seenSince, m.since
	clear(m.seenSince)
}

// Since returns when key was first mentioned without a pass in between that did
// not mention it, and remembers that it was mentioned now.
func (m *Memory) Since(key string, now time.Time) time.Time {
	t, ok := m.seenSince[key]
	if ok {
		return t
	}
	if t, ok = m.since[key]; !ok || t.After(now) { // After: the clock was set back
		t = now
	}
	m.seenSince[key] = t
	return t
}

// Best returns the largest n ever given for key.
func (m *Memory) Best(key string, n int64) int64 {
	n = max(n, m.best[key])
	m.best[key] = n
	return n
}

// Retain drops the best of every key with the prefix that keep does not want, so
// that volumes which come and go leave nothing behind.
func (m *Memory) Retain(prefix string, keep func(key string) bool) {
	maps.DeleteFunc(m.best, func(key string, _ int64) bool {
		return strings.HasPrefix(key, prefix) && !keep(key)
	})
}

// Forget drops the best of key, for things that are gone for good.
func (m *Memory) Forget(key string) { delete(m.best, key) }

// Keep stores what was read from the host under key, so that an unchanged file
// is not read again. The value must hold what tells whether it still is true,
// such as the file's inode and modification time.
func (m *Memory) Keep(key string, value any) {
	if m.kept == nil {
		m.kept = map[string]any{}
	}
	m.kept[key] = value
}

// Kept returns what [Memory.Keep] stored last.
func Kept[T any](m *Memory, key string) (T, bool) {
	v, ok := m.kept[key].(T)
	return v, ok
}
