package report

import (
	"context"

	"github.com/hosthygiene/agent/pkg/probes"
)

// Cluster is what probes can know of the cluster: the Node that a [Publisher]
// watches anyway, and the few objects they may ask for by name.
type Cluster struct {
	publisher *Publisher
	api       *API
	known     func()
}

var _ probes.Cluster = Cluster{}

// NewCluster joins the two; known returns when the Node has been seen, or is no
// longer awaited.
func NewCluster(publisher *Publisher, api *API, known func()) Cluster {
	return Cluster{publisher, api, known}
}

// Node implements [probes.Cluster].
func (c Cluster) Node() (probes.Node, bool) {
	// Or what the agent before us found by it would clear and come again.
	c.known()
	n := c.publisher.Node()
	if n == nil {
		return probes.Node{}, false
	}
	node := probes.Node{Name: n.Metadata.Name, KubeletVersion: n.Status.NodeInfo.KubeletVersion, VolumesInUse: n.Status.VolumesInUse}
	for _, v := range n.Status.VolumesAttached {
		node.VolumesAttached = append(node.VolumesAttached, v.Name)
	}
	for _, cond := range n.Status.Conditions {
		node.Conditions = append(node.Conditions, probes.NodeCondition{Type: cond.Type, Status: cond.Status, Heartbeat: cond.LastHeartbeatTime.Time})
	}
	return node, true
}

// Version implements [probes.Cluster].
func (c Cluster) Version(ctx context.Context) (string, error) { return c.api.Version(ctx) }

// Attachment implements [probes.Cluster].
func (c Cluster) Attachment(ctx context.Context, name string) (probes.Attachment, bool, error) {
	v, err := c.api.VolumeAttachment(ctx, name)
	if v == nil {
		return probes.Attachment{}, false, err
	}
	return probes.Attachment{
		Volume: v.Spec.Source.PersistentVolumeName, Attached: v.Status.Attached, Deleting: v.Metadata.DeletionTimestamp != nil,
		DetachError: v.Status.DetachError.Message, Metadata: v.Status.AttachmentMetadata,
	}, true, nil
}

// Claim implements [probes.Cluster].
func (c Cluster) Claim(ctx context.Context, volume string) (string, error) {
	return c.api.Claim(ctx, volume)
}
