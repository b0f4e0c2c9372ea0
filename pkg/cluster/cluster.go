// Package cluster reads a cluster through its API servers, with the rights of
// whoever sits at the keyboard: lists in pages, one watch, the API servers one by
// one, and commands in the agent's pods.
package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// pageSize is how many objects one answer holds at most.
const pageSize = 500

// agentPods selects the agent's pods by the label that the manifests give them.
const agentPods = "app.kubernetes.io/name=host-hygiene-agent"

// Client asks one cluster.
type Client struct {
	config *rest.Config
	rest   *rest.RESTClient
	// Listing hears before each page of a list what is listed and how many
	// objects have come.
	Listing func(path string, come int)
}

// New returns a client for the API server of a kubeconfig.
func New(config *rest.Config) (*Client, error) {
	config = rest.CopyConfig(config)
	// As kubectl does: the API server's own fairness is the limit.
	config.QPS, config.Burst = 50, 300
	client, err := newREST(config)
	if err != nil {
		return nil, err
	}
	return &Client{config: config, rest: client, Listing: func(string, int) {}}, nil
}

// newREST knows the three groups whose types are used as they are.
func newREST(config *rest.Config) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, storagev1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, err
		}
	}
	config = rest.CopyConfig(config)
	config.GroupVersion = &corev1.SchemeGroupVersion
	config.APIPath = "/api"
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType = "application/vnd.kubernetes.protobuf"
	config.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	return rest.RESTClientFor(config)
}

// list is what every list type of the API is.
type list interface {
	runtime.Object
	GetListMeta() metav1.ListInterface
}

// pages asks for a list page by page; page is called with each, in into. A page
// whose continuation has expired makes the server send the rest inconsistently,
// which is as good here.
func (c *Client) pages(ctx context.Context, path string, opts metav1.ListOptions, into func() list, page func(list)) error {
	opts.Limit = pageSize
	for come := 0; ; {
		c.Listing(path, come)
		l := into()
		if err := c.rest.Get().AbsPath(path).VersionedParams(&opts, metav1.ParameterCodec).Do(ctx).Into(l); err != nil {
			return err
		}
		page(l)
		come += meta.LenList(l)
		if opts.Continue = l.GetListMeta().GetContinue(); opts.Continue == "" {
			return nil
		}
	}
}

// Nodes lists the nodes that a label selector selects, all with "".
func (c *Client) Nodes(ctx context.Context, selector string) (out []corev1.Node, err error) {
	err = c.pages(ctx, "/api/v1/nodes", metav1.ListOptions{LabelSelector: selector},
		func() list { return new(corev1.NodeList) },
		func(l list) {
			for _, n := range l.(*corev1.NodeList).Items {
				slim(&n)
				out = append(out, n)
			}
		})
	return out, wrap(err, "listing nodes")
}

// Node gets one node.
func (c *Client) Node(ctx context.Context, name string) (corev1.Node, error) {
	var n corev1.Node
	err := c.rest.Get().Resource("nodes").Name(name).Do(ctx).Into(&n)
	return n, wrap(err, "getting the node")
}

// slim drops what is long and never looked at.
func slim(n *corev1.Node) {
	n.Status.Images = nil
	n.ManagedFields = nil
}

// AgentPods lists the agent's pods in a namespace, only those of a node unless it
// is "". The slice is not nil without an error.
func (c *Client) AgentPods(ctx context.Context, namespace, node string) ([]corev1.Pod, error) {
	opts := metav1.ListOptions{LabelSelector: agentPods}
	if node != "" {
		opts.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", node).String()
	}
	pods, err := c.pods(ctx, namespace, opts)
	if err != nil {
		return nil, wrap(err, "listing the agent's pods in "+namespace)
	}
	return append([]corev1.Pod{}, pods...), nil
}

func (c *Client) pods(ctx context.Context, namespace string, opts metav1.ListOptions) (out []corev1.Pod, err error) {
	path := "/api/v1/pods"
	if namespace != "" {
		path = "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods"
	}
	err = c.pages(ctx, path, opts, func() list { return new(corev1.PodList) },
		func(l list) { out = append(out, l.(*corev1.PodList).Items...) })
	return out, err
}

// VolumeUsers lists the pods that may tell of stuck volumes: all that are
// Pending, and all on some nodes.
func (c *Client) VolumeUsers(ctx context.Context, nodes []string) ([]corev1.Pod, error) {
	out, err := c.pods(ctx, "", metav1.ListOptions{FieldSelector: "status.phase=Pending"})
	if err != nil {
		return nil, wrap(err, "listing pods that are Pending")
	}
	for _, n := range nodes {
		on, err := c.pods(ctx, "", metav1.ListOptions{FieldSelector: fields.AndSelectors(
			fields.OneTermEqualSelector("spec.nodeName", n), fields.OneTermNotEqualSelector("status.phase", "Pending")).String()})
		if err != nil {
			return nil, wrap(err, "listing the pods of "+n)
		}
		out = append(out, on...)
	}
	return out, nil
}

// Volumes lists the attachments and the volumes they may be of.
func (c *Client) Volumes(ctx context.Context) (attachments []storagev1.VolumeAttachment, volumes []corev1.PersistentVolume, err error) {
	err = c.pages(ctx, "/apis/storage.k8s.io/v1/volumeattachments", metav1.ListOptions{},
		func() list { return new(storagev1.VolumeAttachmentList) },
		func(l list) { attachments = append(attachments, l.(*storagev1.VolumeAttachmentList).Items...) })
	if err != nil {
		return nil, nil, wrap(err, "listing volumeattachments")
	}
	err = c.pages(ctx, "/api/v1/persistentvolumes", metav1.ListOptions{},
		func() list { return new(corev1.PersistentVolumeList) },
		func(l list) { volumes = append(volumes, l.(*corev1.PersistentVolumeList).Items...) })
	return attachments, volumes, wrap(err, "listing persistentvolumes")
}

// CSINodes lists what the CSI drivers call the nodes.
func (c *Client) CSINodes(ctx context.Context) (out []storagev1.CSINode, err error) {
	err = c.pages(ctx, "/apis/storage.k8s.io/v1/csinodes", metav1.ListOptions{},
		func() list { return new(storagev1.CSINodeList) },
		func(l list) { out = append(out, l.(*storagev1.CSINodeList).Items...) })
	return out, wrap(err, "listing csinodes")
}

// Namespaces lists them all.
func (c *Client) Namespaces(ctx context.Context) (out []corev1.Namespace, err error) {
	err = c.pages(ctx, "/api/v1/namespaces", metav1.ListOptions{},
		func() list { return new(corev1.NamespaceList) },
		func(l list) { out = append(out, l.(*corev1.NamespaceList).Items...) })
	return out, wrap(err, "listing namespaces")
}

// Items lists a resource whose types are not ours to import, as JSON, into the
// few fields that T has.
func Items[T any](ctx context.Context, c *Client, path, accept string) ([]T, error) {
	var out []T
	next := ""
	for {
		var page struct {
			Metadata metav1.ListMeta `json:"metadata"`
			Items    []T             `json:"items"`
		}
		c.Listing(path, len(out))
		raw, err := c.rest.Get().AbsPath(path).SetHeader("Accept", accept).
			Param("limit", strconv.Itoa(pageSize)).Param("continue", next).Do(ctx).Raw()
		if err == nil {
			err = json.Unmarshal(raw, &page)
		}
		if err != nil {
			return nil, wrap(err, "listing "+path)
		}
		out = append(out, page.Items...)
		if next = page.Metadata.Continue; next == "" {
			return out, nil
		}
	}
}

const (
	asJSON     = "application/json"
	asMetadata = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
)

// maxPage bounds a metrics page; that of a large API server has tens of
// megabytes.
const maxPage = 256 << 20

// Metrics reads the agent's metrics page through the API server. That takes the
// right to proxy to pods, not the one to execute in them.
func (c *Client) Metrics(ctx context.Context, namespace, pod string) (io.ReadCloser, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	path := fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:20266/proxy/metrics", url.PathEscape(namespace), url.PathEscape(pod))
	body, err := c.rest.Get().AbsPath(path).SetHeader("Accept", "text/plain").Stream(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	return bounded{io.LimitReader(body, maxPage), body, cancel}, nil
}

type bounded struct {
	io.Reader
	body   io.Closer
	cancel context.CancelFunc
}

func (b bounded) Close() error {
	b.cancel()
	return b.body.Close()
}

func wrap(err error, doing string) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// Version is the API server's gitVersion.
func (c *Client) Version(ctx context.Context) (string, error) {
	v, err := versionOf(ctx, c.rest)
	return v, wrap(err, "asking the API server for its version")
}

func versionOf(ctx context.Context, r *rest.RESTClient) (string, error) {
	var v struct {
		GitVersion string `json:"gitVersion"`
	}
	raw, err := r.Verb(http.MethodGet).AbsPath("/version").SetHeader("Accept", asJSON).Do(ctx).Raw()
	if err == nil {
		err = json.Unmarshal(raw, &v)
	}
	return v.GitVersion, err
}
