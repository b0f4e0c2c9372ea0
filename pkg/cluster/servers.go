package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/hosthygiene/agent/pkg/fleet"
)

// serverTimeout bounds everything that is asked of one API server directly: most
// laptops can not reach any.
const serverTimeout = 20 * time.Second

// dialTimeout is how long an address may take to be reached.
const dialTimeout = 3 * time.Second

// serverName is what every API server's certificate names, and nobody else's: a
// kubelet's is signed by the same authority in many clusters. Credentials are
// sent to nobody without it.
const serverName = "kubernetes.default.svc"

// APIServers asks each API server that the EndpointSlices of the Service
// default/kubernetes name, directly, with the user's own credentials: for its
// version, its storage version hashes and the deprecated APIs it was asked for.
func (c *Client) APIServers(ctx context.Context) ([]fleet.APIServer, []fleet.Metrics, error) {
	addresses, err := c.endpoints(ctx)
	if err != nil {
		return nil, nil, err
	}
	config, err := c.direct(ctx)
	if err != nil {
		servers := make([]fleet.APIServer, len(addresses))
		for i, a := range addresses {
			servers[i] = fleet.APIServer{Address: a, Err: err}
		}
		return servers, nil, nil
	}
	servers, pages := make([]fleet.APIServer, len(addresses)), make([]fleet.Metrics, len(addresses))
	var wg sync.WaitGroup
	for i, a := range addresses {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, serverTimeout)
			defer cancel()
			servers[i], pages[i] = ask(ctx, config, a)
		})
	}
	wg.Wait()
	pages = slices.DeleteFunc(pages, func(m fleet.Metrics) bool { return errors.Is(m.Err, errNotReached) })
	return servers, pages, nil
}

// endpoints are the addresses of the API servers, "host:port".
func (c *Client) endpoints(ctx context.Context) ([]string, error) {
	var out []string
	err := c.pages(ctx, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
		metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=kubernetes"},
		func() list { return new(discoveryv1.EndpointSliceList) },
		func(l list) {
			for _, s := range l.(*discoveryv1.EndpointSliceList).Items {
				for _, p := range s.Ports {
					for _, e := range s.Endpoints {
						for _, a := range e.Addresses {
							if p.Port != nil {
								out = append(out, net.JoinHostPort(a, strconv.Itoa(int(*p.Port))))
							}
						}
					}
				}
			}
		})
	slices.Sort(out)
	return slices.Compact(out), wrap(err, "listing the endpointslices of default/kubernetes")
}

// direct is a config for whatever address of this cluster, with the cluster's own
// authority: the kubeconfig may name that of a load balancer.
func (c *Client) direct(ctx context.Context) (*rest.Config, error) {
	if c.config.Insecure {
		return nil, errors.New("not checkable: the kubeconfig does not verify certificates, and credentials are not sent to addresses that nobody vouches for")
	}
	config := rest.CopyConfig(c.config)
	config.ServerName = serverName
	config.Timeout = serverTimeout
	if config.Dial == nil {
		config.Dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	var published corev1.ConfigMap
	err := c.rest.Get().AbsPath("/api/v1/namespaces/kube-system/configmaps/kube-root-ca.crt").Do(ctx).Into(&published)
	switch {
	case err == nil && published.Data["ca.crt"] != "":
		config.CAData, config.CAFile = []byte(published.Data["ca.crt"]), ""
	case len(config.CAData) == 0 && config.CAFile == "":
		return nil, errors.New("not checkable: the cluster's certificate authority is neither in the kubeconfig nor to be read from the ConfigMap kube-system/kube-root-ca.crt")
	}
	return config, nil
}

var errNotReached = errors.New("not checkable from here")

func ask(ctx context.Context, config *rest.Config, address string) (fleet.APIServer, fleet.Metrics) {
	config = rest.CopyConfig(config)
	config.Host = "https://" + address
	s, m := fleet.APIServer{Address: address}, fleet.Metrics{Address: address}
	client, err := newREST(config)
	if err == nil {
		s.Version, err = versionOf(ctx, client)
	}
	if err != nil {
		s.Err = fmt.Errorf("%w: %w", errNotReached, short(err))
		m.Err = s.Err
		return s, m
	}
	s.Hashes, s.Err = hashes(ctx, client)
	m.APIs, m.Err = deprecated(ctx, client)
	return s, m
}

// short takes off the address, which is told with it.
func short(err error) error {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return errors.New("no answer in time")
	}
	return err
}

// Deprecated asks the API server of the kubeconfig for the deprecated APIs it
// was asked for.
func (c *Client) Deprecated(ctx context.Context) fleet.Metrics {
	m := fleet.Metrics{Address: "the kubeconfig's address"}
	m.APIs, m.Err = deprecated(ctx, c.rest)
	return m
}

func deprecated(ctx context.Context, client *rest.RESTClient) ([]fleet.DeprecatedAPI, error) {
	body, err := client.Get().AbsPath("/metrics").SetHeader("Accept", "text/plain").Stream(ctx)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return fleet.DeprecatedAPIs(io.LimitReader(body, maxPage))
}

// Resource is one that an API server serves.
type Resource struct {
	Group, Version, Name string
	Namespaced           bool
	Verbs                []string
	hash                 string
}

// Path is where its objects are listed, of all namespaces.
func (r Resource) Path() string {
	if r.Group == "" {
		return "/api/" + r.Version + "/" + r.Name
	}
	return "/apis/" + r.Group + "/" + r.Version + "/" + r.Name
}

// String is as kubectl takes it.
func (r Resource) String() string {
	if r.Group == "" {
		return r.Name
	}
	return r.Name + "." + r.Group
}

// Resources are all that the API server serves, in each group's preferred
// version, and what could not be learnt: aggregated APIs may not answer.
func (c *Client) Resources(ctx context.Context) ([]Resource, []string, error) {
	return resources(ctx, c.rest, true)
}

// resources uses the discovery of old: the aggregated one has no hashes.
func resources(ctx context.Context, client *rest.RESTClient, preferred bool) ([]Resource, []string, error) {
	get := func(path string, into any) error {
		raw, err := client.Get().AbsPath(path).SetHeader("Accept", asJSON).Do(ctx).Raw()
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, into)
	}
	var groups metav1.APIGroupList
	if err := get("/apis", &groups); err != nil {
		return nil, nil, wrap(err, "asking for the API groups")
	}
	versions := []string{"v1"}
	for _, g := range groups.Groups {
		for _, v := range g.Versions {
			if !preferred || v == g.PreferredVersion {
				versions = append(versions, v.GroupVersion)
			}
		}
	}
	answers, errs := make([][]Resource, len(versions)), make([]error, len(versions))
	slots := make(chan struct{}, 8)
	var wg sync.WaitGroup
	for i, v := range versions {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			path := "/apis/" + v
			if v == "v1" {
				path = "/api/v1"
			}
			var served metav1.APIResourceList
			if errs[i] = get(path, &served); errs[i] != nil {
				return
			}
			group, version, ok := strings.Cut(v, "/")
			if !ok {
				group, version = "", v
			}
			for _, r := range served.APIResources {
				if !strings.Contains(r.Name, "/") {
					answers[i] = append(answers[i], Resource{group, version, r.Name, r.Namespaced, r.Verbs, r.StorageVersionHash})
				}
			}
		})
	}
	wg.Wait()
	var not []string
	for i, err := range errs {
		if err != nil {
			not = append(not, fmt.Sprintf("the resources of %s: %v", versions[i], err))
		}
	}
	return slices.Concat(answers...), not, nil
}

// hashes are the storage version hashes by resource; the same whichever served
// version of it is asked.
func hashes(ctx context.Context, client *rest.RESTClient) (map[string]string, error) {
	all, _, err := resources(ctx, client, false)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, r := range all {
		if r.hash != "" {
			out[strings.TrimPrefix(r.Group+"/"+r.Name, "/")] = r.hash
		}
	}
	return out, nil
}

// CRDs lists the CustomResourceDefinitions.
func (c *Client) CRDs(ctx context.Context) ([]fleet.CRD, error) {
	return Items[fleet.CRD](ctx, c, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", asJSON)
}

// Migrations lists the StorageVersionMigrations; the version is "" where the API
// server serves none.
func (c *Client) Migrations(ctx context.Context) (list []fleet.Migration, version string, err error) {
	var group metav1.APIGroup
	raw, err := c.rest.Get().AbsPath("/apis/storagemigration.k8s.io").SetHeader("Accept", asJSON).Do(ctx).Raw()
	if apierrors.IsNotFound(err) {
		return nil, "", nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &group)
	}
	if err != nil {
		return nil, "", wrap(err, "asking for storagemigration.k8s.io")
	}
	version = group.PreferredVersion.Version
	list, err = Items[fleet.Migration](ctx, c, "/apis/storagemigration.k8s.io/"+version+"/storageversionmigrations", asJSON)
	return list, version, err
}

// usual are the resources whose objects get stuck in Terminating most.
var usual = []Resource{
	{Version: "v1", Name: "pods"}, {Version: "v1", Name: "persistentvolumeclaims"}, {Version: "v1", Name: "persistentvolumes"},
	{Version: "v1", Name: "nodes"}, {Group: "apiextensions.k8s.io", Version: "v1", Name: "customresourcedefinitions"},
}

// Dying lists what is being deleted, by metadata only: among the usual resources,
// or among all that can be listed.
func (c *Client) Dying(ctx context.Context, everything bool) (found []fleet.Dying, looked, not []string, err error) {
	among := usual
	if everything {
		all, unknown, err := c.Resources(ctx)
		if err != nil {
			return nil, nil, nil, err
		}
		among, not = nil, unknown
		for _, r := range all {
			// Namespaces have a check of their own, Events are many and short-lived.
			if slices.Contains(r.Verbs, "list") && slices.Contains(r.Verbs, "delete") && r.String() != "namespaces" && r.Name != "events" {
				among = append(among, r)
			}
		}
	}
	for _, r := range among {
		items, err := Items[metav1.PartialObjectMetadata](ctx, c, r.Path(), asMetadata)
		if ctx.Err() != nil {
			return nil, nil, nil, ctx.Err()
		}
		if err != nil {
			not = append(not, err.Error())
			continue
		}
		looked = append(looked, r.String())
		for _, o := range items {
			if o.DeletionTimestamp != nil {
				found = append(found, fleet.Dying{Resource: r.String(), Namespace: o.Namespace, Name: o.Name, Deleted: o.DeletionTimestamp.UTC(), Finalizers: o.Finalizers})
			}
		}
	}
	return found, looked, not, nil
}
