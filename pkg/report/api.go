package report

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// API is the little of the Kubernetes API that reporting needs, over client-go's
// REST client. Objects are decoded into the few fields that are read: the
// generated types and their codecs would cost more memory than the rest of the
// agent together.
type API struct {
	node string
	gate *gate
	// endpoints: the Service first, then the address in the kubelet's
	// kubeconfig, which works before kube-proxy does.
	mu        sync.Mutex
	endpoints []*rest.RESTClient
	current   int
	// wrote counts requests by resource and outcome, for the metric.
	wrote map[[2]string]int
	// lists counts how often the Node was listed, which is after each break of
	// the watch, when a server answers again.
	lists   int
	version knownVersion
}

// NewAPI returns a client for one node. Every config stands for one address of
// the same API server; they are tried in turn when one can not be reached.
func NewAPI(node string, configs ...*rest.Config) (*API, error) {
	a := &API{node: node, gate: newGate(), wrote: map[[2]string]int{}}
	scheme := runtime.NewScheme()
	v1 := schema.GroupVersion{Version: "v1"}
	metav1.AddToGroupVersion(scheme, v1) // for Status, in which errors come
	codecs := serializer.NewCodecFactory(scheme)
	for _, c := range configs {
		c := rest.CopyConfig(c)
		c.GroupVersion = &v1
		c.APIPath = "/api"
		c.NegotiatedSerializer = codecs.WithoutConversion()
		c.ContentType = runtime.ContentTypeJSON
		// The gate below is the only limiter: client-go's own would be a second
		// back-off on top of it.
		c.QPS = -1
		if c.Dial == nil {
			c.Dial = (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext
		}
		client, err := rest.RESTClientFor(c)
		if err != nil {
			return nil, err
		}
		a.endpoints = append(a.endpoints, client)
	}
	if len(a.endpoints) == 0 {
		return nil, errors.New("no API server address")
	}
	return a, nil
}

// Writes returns how many writes were made, by resource and outcome.
func (a *API) Writes() map[[2]string]int {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make(map[[2]string]int, len(a.wrote))
	for k, n := range a.wrote {
		out[k] = n
	}
	return out
}

func (a *API) count(resource string, err error) {
	outcome := "ok"
	switch {
	case err == nil:
	case apierrors.ReasonForError(err) != metav1.StatusReasonUnknown:
		outcome = string(apierrors.ReasonForError(err))
	default:
		outcome = "unreachable"
	}
	a.mu.Lock()
	a.wrote[[2]string{resource, outcome}]++
	a.mu.Unlock()
}

// do makes one attempt when the gate lets it through. The timeout (0: none)
// begins there, so that waiting in an outage is not itself a failure.
func (a *API) do(ctx context.Context, timeout time.Duration, attempt func(ctx context.Context, c *rest.RESTClient) error) error {
	if err := a.gate.enter(ctx); err != nil {
		return err
	}
	parent := ctx
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout)
		defer cancel()
	}
	a.mu.Lock()
	client := a.endpoints[a.current]
	a.mu.Unlock()
	err := attempt(ctx, client)
	stopping := parent.Err() != nil && !errors.Is(err, context.DeadlineExceeded)
	if unreachable(err) && !stopping {
		a.mu.Lock()
		a.current = (a.current + 1) % len(a.endpoints)
		a.mu.Unlock()
	}
	a.gate.leave(err, stopping || errors.Is(err, errNotNeeded))
	return err
}

// answer makes one request. DoRaw would do, but for its errors: it keeps the
// server's own words, such as who forbids what, to itself.
func answer(ctx context.Context, r *rest.Request) ([]byte, error) {
	result := r.MaxRetries(0).Do(ctx)
	if err := result.Error(); err != nil {
		return nil, err
	}
	return result.Raw()
}

// unreachable: no HTTP answer at all.
func unreachable(err error) bool {
	if err == nil {
		return false
	}
	var ue *url.Error
	var ne net.Error
	return errors.As(err, &ue) || errors.As(err, &ne)
}

// Node is what the agent reads of its Node.
type Node struct {
	Metadata struct {
		Name            string            `json:"name"`
		UID             types.UID         `json:"uid"`
		ResourceVersion string            `json:"resourceVersion"`
		Labels          map[string]string `json:"labels"`
		Annotations     NodeAnnotations   `json:"annotations"`
	} `json:"metadata"`
	Spec struct {
		// Unschedulable: somebody has cordoned it.
		Unschedulable bool `json:"unschedulable"`
	} `json:"spec"`
	Status struct {
		Conditions []NodeCondition `json:"conditions"`
		NodeInfo   struct {
			KubeletVersion string `json:"kubeletVersion"`
		} `json:"nodeInfo"`
		VolumesAttached []struct {
			Name string `json:"name"`
		} `json:"volumesAttached"`
		VolumesInUse []string `json:"volumesInUse"`
	} `json:"status"`
}

// NodeAnnotations are those of a Node that are read; all of them together can be
// many kilobytes.
type NodeAnnotations struct {
	// Rebooting is kured's, with the time at which it began; it is there while
	// kured drains and reboots the node (kured's flag --annotate-nodes).
	Rebooting string `json:"weave.works/kured-reboot-in-progress"`
}

// NodeCondition is a Node condition on the wire.
type NodeCondition struct {
	Type               string      `json:"type"`
	Status             string      `json:"status"`
	LastHeartbeatTime  metav1.Time `json:"lastHeartbeatTime"`
	LastTransitionTime metav1.Time `json:"lastTransitionTime"`
	Reason             string      `json:"reason"`
	Message            string      `json:"message"`
}

// requestTimeout bounds everything but watches.
const requestTimeout = 15 * time.Second

// errNotNeeded ends an attempt before anything is asked.
var errNotNeeded = errors.New("not needed any more")

// PatchConditions applies a strategic merge patch to the node's status and
// returns the node as it is afterwards. The patch is made at the last moment,
// after whatever wait an outage causes; nil says that there is nothing to write
// any more, and then neither a Node nor an error is returned.
func (a *API) PatchConditions(ctx context.Context, patch func() []byte) (*Node, error) {
	var node Node
	err := a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		body := patch()
		if body == nil {
			return errNotNeeded
		}
		raw, err := answer(ctx, c.Patch(types.StrategicMergePatchType).Resource("nodes").Name(a.node).SubResource("status").Body(body))
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, &node)
	})
	if errors.Is(err, errNotNeeded) {
		return nil, nil
	}
	a.count("nodes/status", err)
	if err != nil {
		return nil, err
	}
	return &node, nil
}

// versionKept is how long an API server's version is believed without a break of
// the watch, for one behind a balancer that hides the break.
const versionKept = 24 * time.Hour

// Version is that of the API server that answers, "v1.36.3". Any account may ask
// (system:public-info-viewer). Behind one address there may be several servers,
// and of several versions during an upgrade. A server does not change its version
// without ending our watch, so that it is asked again only after that.
func (a *API) Version(ctx context.Context) (string, error) {
	a.mu.Lock()
	kept, lists := a.version, a.lists
	a.mu.Unlock()
	if kept.version != "" && kept.lists == lists && time.Since(kept.at) < versionKept {
		return kept.version, nil
	}
	var version struct {
		GitVersion string `json:"gitVersion"`
	}
	err := a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		raw, err := answer(ctx, c.Get().AbsPath("/version"))
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, &version)
	})
	if err == nil {
		a.mu.Lock()
		a.version = knownVersion{version.GitVersion, lists, time.Now()}
		a.mu.Unlock()
	}
	return version.GitVersion, err
}

type knownVersion struct {
	version string
	lists   int // how often the Node had been listed
	at      time.Time
}

// VolumeAttachment is what is read of one.
type VolumeAttachment struct {
	Metadata struct {
		DeletionTimestamp *metav1.Time `json:"deletionTimestamp"`
	} `json:"metadata"`
	Spec struct {
		Source struct {
			PersistentVolumeName string `json:"persistentVolumeName"`
		} `json:"source"`
	} `json:"spec"`
	Status struct {
		Attached           bool              `json:"attached"`
		AttachmentMetadata map[string]string `json:"attachmentMetadata"`
		DetachError        struct {
			Message string `json:"message"`
		} `json:"detachError"`
	} `json:"status"`
}

// VolumeAttachment reads one by its name; it is nil where there is none.
func (a *API) VolumeAttachment(ctx context.Context, name string) (*VolumeAttachment, error) {
	var v VolumeAttachment
	found, err := a.get(ctx, &v, func(r *rest.Request) *rest.Request {
		return r.AbsPath("/apis/storage.k8s.io/v1/volumeattachments", name)
	})
	if !found {
		return nil, err
	}
	return &v, nil
}

// Claim reads which claim a PersistentVolume is bound to, "namespace/name"; empty
// where it is bound to none, or is not there.
func (a *API) Claim(ctx context.Context, volume string) (string, error) {
	var v struct {
		Spec struct {
			ClaimRef struct {
				Namespace string `json:"namespace"`
				Name      string `json:"name"`
			} `json:"claimRef"`
		} `json:"spec"`
	}
	found, err := a.get(ctx, &v, func(r *rest.Request) *rest.Request {
		return r.Resource("persistentvolumes").Name(volume)
	})
	if !found || v.Spec.ClaimRef.Name == "" {
		return "", err
	}
	return v.Spec.ClaimRef.Namespace + "/" + v.Spec.ClaimRef.Name, nil
}

// get reads one object; found is false where there is none.
func (a *API) get(ctx context.Context, into any, of func(*rest.Request) *rest.Request) (found bool, err error) {
	err = a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		raw, err := answer(ctx, of(c.Get()))
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, into)
	})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// CreateEvent posts an Event of the core API. One that exists already was
// posted before a crash and counts as done.
func (a *API) CreateEvent(ctx context.Context, namespace string, event []byte) error {
	err := a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		_, err := answer(ctx, c.Post().Namespace(namespace).Resource("events").Body(event))
		if apierrors.IsAlreadyExists(err) {
			return nil
		}
		return err
	})
	a.count("events", err)
	return err
}

// Follow calls seen with the node whenever it changes, and with nil when it is
// deleted, until ctx ends: one list and one watch, both selected by name.
func (a *API) Follow(ctx context.Context, seen func(*Node)) {
	refused := 0
	for ctx.Err() == nil {
		version, err := a.list(ctx, seen)
		listed := err == nil
		for err == nil && ctx.Err() == nil {
			version, err = a.watch(ctx, version, seen)
		}
		switch {
		case !retryable(err) && !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err):
			pause(ctx, backOff(refused, longestRefused))
			refused++
		case listed:
			// An API server that stops ends the watches of the whole fleet in the
			// same moment; its successor must not be asked by all of them in the
			// next. Nobody waits for this: writing does not need the watch. A
			// version that has expired is no refusal either: it comes every few
			// hours where a node is quiet, and would add up.
			pause(ctx, rand.N(watchSpread))
			refused = 0
		default: // the gate makes us wait
		}
	}
}

// watchSpread is how long at most until a watch that ended too early is made
// again.
const watchSpread = 10 * time.Second

// longestRefused is the longest back-off after an answer that says no, which the
// gate does not hold against the API server. An API server says no for a second
// or two after its start, before it has read who may do what; and for as long as
// an uninstall takes, which deletes the agents' rights before the agents.
const longestRefused = 2 * time.Minute

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

func (a *API) list(ctx context.Context, seen func(*Node)) (version string, err error) {
	var list struct {
		Metadata metav1.ListMeta `json:"metadata"`
		Items    []Node          `json:"items"`
	}
	err = a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		raw, err := answer(ctx, c.Get().Resource("nodes").Param("fieldSelector", "metadata.name="+a.node))
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, &list)
	})
	if err != nil {
		return "", err
	}
	a.mu.Lock()
	a.lists++
	a.mu.Unlock()
	if len(list.Items) == 0 {
		seen(nil)
	} else {
		seen(&list.Items[0])
	}
	return list.Metadata.ResourceVersion, nil
}

// watch returns the version to go on from when the watch ended at its time.
func (a *API) watch(ctx context.Context, version string, seen func(*Node)) (string, error) {
	// The server ends a watch after 30 to 60 minutes by itself; asking for a
	// time of our own spreads the agents of a fleet.
	length := 30*time.Minute + rand.N(30*time.Minute)
	// The answer's header must come in time, its body may take an hour: a
	// server that accepts and never answers would keep everybody else waiting
	// at the gate.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var body io.ReadCloser
	began := time.Now()
	err := a.do(ctx, 0, func(ctx context.Context, c *rest.RESTClient) (err error) {
		late := time.AfterFunc(requestTimeout, cancel)
		body, err = c.Get().Resource("nodes").Param("fieldSelector", "metadata.name="+a.node).
			Param("watch", "1").Param("resourceVersion", version).Param("allowWatchBookmarks", "true").
			Param("timeoutSeconds", fmt.Sprint(int(length.Seconds()))).
			MaxRetries(0).Stream(ctx)
		if !late.Stop() && err != nil {
			return fmt.Errorf("no answer to a watch within %s: %w", requestTimeout, context.DeadlineExceeded)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	defer body.Close()
	dec := json.NewDecoder(body)
	for {
		var ev struct {
			Type   string `json:"type"`
			Object Node   `json:"object"`
		}
		err := dec.Decode(&ev)
		if ev.Type == "ERROR" { // most often 410 Gone: list again. It holds no Node
			return "", errors.New("the API server ended the watch with an error")
		}
		if err != nil {
			if errors.Is(err, io.EOF) && time.Since(began) > length-time.Minute {
				return version, nil // the time-out we asked for: go on from here
			}
			return "", err
		}
		version = ev.Object.Metadata.ResourceVersion
		switch ev.Type {
		case "ADDED", "MODIFIED":
			seen(&ev.Object)
		case "DELETED":
			seen(nil)
		}
	}
}

// gate is the one back-off for everything that talks to the API server: 1 s to
// 60 s with full jitter, Retry-After honoured. While it is shut nobody tries, so
// that an outage costs one connection attempt at a time and not one a caller.
type gate struct {
	mu       sync.Mutex
	failures int
	until    time.Time
	// turn is held by the only attempt under way while the gate is failing.
	turn chan struct{}
}

func newGate() *gate { return &gate{turn: make(chan struct{}, 1)} }

func (g *gate) enter(ctx context.Context) error {
	select {
	case g.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	g.mu.Lock()
	wait := time.Until(g.until)
	g.mu.Unlock()
	if wait > 0 {
		t := time.NewTimer(wait)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
			<-g.turn
			return ctx.Err()
		}
	}
	return nil
}

// leave takes note of how an attempt ended; unasked says that nothing was learnt
// by it, because we are stopping or it was not made.
func (g *gate) leave(err error, unasked bool) {
	g.mu.Lock()
	defer func() { g.mu.Unlock(); <-g.turn }()
	switch {
	case err == nil, !retryable(err):
		g.failures = 0
		g.until = time.Time{}
		return
	case unasked:
		return
	}
	wait := backOff(g.failures, time.Minute)
	g.failures++
	if s, ok := apierrors.SuggestsClientDelay(err); ok {
		// On top of it and not instead: an overloaded server names the same
		// second to everybody it turns away.
		wait += time.Duration(s) * time.Second
	}
	g.until = time.Now().Add(wait)
}

// backOff is how long to wait after so many failures and one more: at most a
// second at first, doubling up to longest, with full jitter.
func backOff(failures int, longest time.Duration) time.Duration {
	ceiling := longest
	if failures < 16 {
		ceiling = min(time.Second<<failures, longest)
	}
	return rand.N(ceiling) + 50*time.Millisecond
}

// retryable: the server can not be reached, is overloaded or broken. An answer
// that says no (forbidden, not found, conflict) is an answer.
func retryable(err error) bool {
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		code := status.Status().Code
		return code == http.StatusTooManyRequests || code >= 500 || code == http.StatusUnauthorized
	}
	return true
}
