package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/client-go/rest"

	"github.com/hosthygiene/agent/pkg/fleet"
	"github.com/hosthygiene/agent/test/pki"
)

// apiServer answers from a map of paths to JSON, and notes who asked with which
// credentials.
type apiServer struct {
	*httptest.Server
	mu     sync.Mutex
	tokens []string
	paths  []string
}

func serve(t *testing.T, a *pki.Authority, answers map[string]string, names ...string) *apiServer {
	t.Helper()
	s := &apiServer{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.tokens = append(s.tokens, r.Header.Get("Authorization"))
		s.paths = append(s.paths, r.URL.String())
		s.mu.Unlock()
		for _, key := range []string{r.URL.String(), r.URL.Path} {
			if body, ok := answers[key]; ok {
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprint(w, body)
				return
			}
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{a.Issue("kube-apiserver", pki.For(append(names, "127.0.0.1")...)).TLS()}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func (s *apiServer) address() string { return strings.TrimPrefix(s.URL, "https://") }

func (s *apiServer) asked() (paths, tokens []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.paths), slices.Clone(s.tokens)
}

func slice(t *testing.T, addresses ...string) string {
	t.Helper()
	var items []map[string]any
	for _, a := range addresses {
		host, port, err := net.SplitHostPort(a)
		if err != nil {
			t.Fatal(err)
		}
		items = append(items, map[string]any{"addressType": "IPv4", "endpoints": []any{map[string]any{"addresses": []string{host}}}, "ports": []any{map[string]any{"name": "https", "port": json.Number(port)}}})
	}
	data, err := json.Marshal(map[string]any{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSliceList", "items": items})
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func server(version, hash string) map[string]string {
	return map[string]string{
		"/version": `{"gitVersion":"` + version + `"}`,
		"/apis":    `{"groups":[{"name":"apps","versions":[{"groupVersion":"apps/v1","version":"v1"}],"preferredVersion":{"groupVersion":"apps/v1","version":"v1"}}]}`,
		"/api/v1":  `{"resources":[{"name":"pods","verbs":["list","delete"],"storageVersionHash":"xPOwRZ+Yhw8="},{"name":"pods/status","verbs":["get"]}]}`,
		"/apis/apps/v1": `{"resources":[{"name":"deployments","verbs":["list","delete"],"storageVersionHash":"` + hash + `"},
			{"name":"deployments/scale","storageVersionHash":"never"}]}`,
		"/metrics": "apiserver_requested_deprecated_apis{group=\"\",removed_release=\"\",resource=\"componentstatuses\",subresource=\"\",version=\"v1\"} 1\n",
	}
}

// TestAPIServers: each is asked by itself, and only one whose certificate names
// an API server is sent the user's token.
func TestAPIServers(t *testing.T) {
	ca := pki.NewAuthority("cluster")
	one := serve(t, ca, server("v1.36.3", "aaa"), serverName)
	two := serve(t, ca, server("v1.37.0", "bbb"), serverName)
	kubelet := serve(t, ca, server("v1.36.3", "aaa"), "node-1") // its certificate is of the same authority
	stranger := serve(t, pki.NewAuthority("cluster"), server("v1.36.3", "aaa"), serverName)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	front := serve(t, pki.NewAuthority("cluster"), map[string]string{ // a load balancer with a certificate of its own
		"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices": slice(t, one.address(), two.address(), kubelet.address(), stranger.address(), closed.Addr().String()),
		"/api/v1/namespaces/kube-system/configmaps/kube-root-ca.crt":  `{"apiVersion":"v1","kind":"ConfigMap","data":{"ca.crt":` + quote(t, ca.CertPEM()) + `}}`,
	}, "front.example")
	config := &rest.Config{Host: front.URL, BearerToken: "secret", TLSClientConfig: rest.TLSClientConfig{CAData: pemOf(front)}}
	c, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	servers, pages, err := c.APIServers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	byAddress := map[string]fleet.APIServer{}
	for _, s := range servers {
		byAddress[s.Address] = s
	}
	want := map[string]fleet.APIServer{
		one.address(): {Address: one.address(), Version: "v1.36.3", Hashes: map[string]string{"pods": "xPOwRZ+Yhw8=", "apps/deployments": "aaa"}},
		two.address(): {Address: two.address(), Version: "v1.37.0", Hashes: map[string]string{"pods": "xPOwRZ+Yhw8=", "apps/deployments": "bbb"}},
	}
	for address, s := range want {
		if diff := cmp.Diff(s, byAddress[address]); diff != "" {
			t.Error(diff)
		}
	}
	for _, address := range []string{kubelet.address(), stranger.address(), closed.Addr().String()} {
		if err := byAddress[address].Err; !errors.Is(err, errNotReached) {
			t.Errorf("%s: %v", address, err)
		}
	}
	if len(pages) != 2 || len(pages[0].APIs) != 1 {
		t.Errorf("metrics: %+v", pages)
	}
	for name, s := range map[string]*apiServer{"a kubelet": kubelet, "a stranger": stranger} {
		if paths, tokens := s.asked(); len(paths) > 0 {
			t.Errorf("%s was asked for %v with %v", name, paths, tokens)
		}
	}
	if _, tokens := two.asked(); !slices.Contains(tokens, "Bearer secret") {
		t.Errorf("credentials of an API server: %q", tokens)
	}
}

// TestNobodyVouches: without an authority nobody is sent credentials.
func TestNobodyVouches(t *testing.T) {
	ca := pki.NewAuthority("cluster")
	one := serve(t, ca, server("v1.36.3", "aaa"), serverName)
	front := serve(t, pki.NewAuthority("cluster"), map[string]string{"/apis/discovery.k8s.io/v1/namespaces/default/endpointslices": slice(t, one.address())}, "front.example")
	c, err := New(&rest.Config{Host: front.URL, BearerToken: "secret", TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
	if err != nil {
		t.Fatal(err)
	}
	servers, pages, err := c.APIServers(t.Context())
	if err != nil || len(servers) != 1 || servers[0].Err == nil || len(pages) != 0 {
		t.Errorf("%+v, %+v, %v", servers, pages, err)
	}
	if paths, _ := one.asked(); len(paths) > 0 {
		t.Errorf("asked for %v", paths)
	}
}

func quote(t *testing.T, b []byte) string {
	t.Helper()
	data, err := json.Marshal(string(b))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func pemOf(s *apiServer) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.TLS.Certificates[0].Certificate[0]})
}

func newClient(t *testing.T, answers map[string]string) (*Client, *apiServer) {
	t.Helper()
	s := serve(t, pki.NewAuthority("cluster"), answers, serverName)
	c, err := New(&rest.Config{Host: s.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

// TestPages: a long list is asked for page by page.
func TestPages(t *testing.T) {
	const first, next = `{"apiVersion":"v1","kind":"NodeList","metadata":{"continue":"more"},"items":[{"metadata":{"name":"a"},"status":{"images":[{"names":["x"]}]}}]}`,
		`{"apiVersion":"v1","kind":"NodeList","metadata":{},"items":[{"metadata":{"name":"b"}}]}`
	c, s := newClient(t, map[string]string{
		"/api/v1/nodes?labelSelector=pool%3Dstorage&limit=500":               first,
		"/api/v1/nodes?continue=more&labelSelector=pool%3Dstorage&limit=500": next,
	})
	nodes, err := c.Nodes(t.Context(), "pool=storage")
	if err != nil {
		paths, _ := s.asked()
		t.Fatal(err, paths)
	}
	if len(nodes) != 2 || nodes[0].Name != "a" || nodes[1].Name != "b" || nodes[0].Status.Images != nil {
		t.Errorf("%+v", nodes)
	}
}

func TestDying(t *testing.T) {
	answers := server("v1.36.3", "aaa")
	answers["/apis"] = `{"groups":[{"name":"apps","versions":[{"groupVersion":"apps/v1"}],"preferredVersion":{"groupVersion":"apps/v1"}},
		{"name":"metrics.k8s.io","versions":[{"groupVersion":"metrics.k8s.io/v1"}],"preferredVersion":{"groupVersion":"metrics.k8s.io/v1"}}]}`
	answers["/api/v1/pods"] = `{"items":[{"metadata":{"namespace":"db","name":"lives"}},{"metadata":{"namespace":"db","name":"goes","deletionTimestamp":"2026-11-22T01:00:00Z","finalizers":["x/y"]}}]}`
	answers["/apis/apps/v1/deployments"] = `{"items":[{"metadata":{"namespace":"db","name":"web","deletionTimestamp":"2026-11-22T02:00:00Z"}}]}`
	c, _ := newClient(t, answers)
	at := time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)
	goes := fleet.Dying{Resource: "pods", Namespace: "db", Name: "goes", Deleted: at, Finalizers: []string{"x/y"}}
	found, looked, not, err := c.Dying(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]fleet.Dying{goes}, found); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"pods"}, looked); diff != "" || len(not) != len(usual)-1 {
		t.Errorf("looked through %v, not %v", looked, not)
	}
	found, looked, not, err = c.Dying(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]fleet.Dying{goes, {Resource: "deployments.apps", Namespace: "db", Name: "web", Deleted: at.Add(time.Hour)}}, found); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"pods", "deployments.apps"}, looked); diff != "" || len(not) != 1 || !strings.Contains(not[0], "metrics.k8s.io/v1") {
		t.Errorf("looked through %v, not %v", looked, not)
	}
}

func TestMigrations(t *testing.T) {
	c, _ := newClient(t, nil)
	if _, version, err := c.Migrations(t.Context()); err != nil || version != "" {
		t.Errorf("where it is not served: %q, %v", version, err)
	}
	c, _ = newClient(t, map[string]string{
		"/apis/storagemigration.k8s.io":                                  `{"preferredVersion":{"version":"v1beta1"}}`,
		"/apis/storagemigration.k8s.io/v1beta1/storageversionmigrations": `{"items":[{"metadata":{"name":"m"},"status":{"conditions":[{"type":"Running","status":"True"}]}}]}`,
	})
	list, version, err := c.Migrations(t.Context())
	if err != nil || version != "v1beta1" || len(list) != 1 || list[0].Status.Conditions[0].Type != "Running" {
		t.Errorf("%+v, %q, %v", list, version, err)
	}
}

// TestMetrics: the page comes through the API server, and ends with the context.
func TestMetrics(t *testing.T) {
	c, _ := newClient(t, map[string]string{"/api/v1/namespaces/ns/pods/p:20266/proxy/metrics": "hosthygiene_x_info{hash=\"a\"} 1\n"})
	body, err := c.Metrics(t.Context(), "ns", "p")
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(body); err != nil || !strings.Contains(b.String(), "hash") {
		t.Errorf("%q, %v", b.String(), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Metrics(ctx, "ns", "p"); err == nil {
		t.Error("no error after the end")
	}
}
