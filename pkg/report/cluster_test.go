package report

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/hosthygiene/agent/pkg/probes"
)

// What comes of the answers of an API server, among them those that are none;
// test/install asks a real one.
func TestCluster(t *testing.T) {
	answers := map[string]struct {
		code int
		body string
	}{
		"/apis/storage.k8s.io/v1/volumeattachments/csi-1": {200, `{"kind":"VolumeAttachment","metadata":{"name":"csi-1","deletionTimestamp":"2026-11-21T12:00:00Z"},"spec":{"attacher":"d","nodeName":"n1","source":{"persistentVolumeName":"pv-1"}},"status":{"attached":true,"attachmentMetadata":{"devicePath":"/dev/sdx"},"detachError":{"time":"2026-11-21T12:00:00Z","message":"busy"}}}`},
		"/apis/storage.k8s.io/v1/volumeattachments/csi-2": {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`},
		"/apis/storage.k8s.io/v1/volumeattachments/csi-3": {403, forbidden},
		"/api/v1/persistentvolumes/pv-1":                  {200, `{"kind":"PersistentVolume","metadata":{"name":"pv-1"},"spec":{"claimRef":{"namespace":"shop","name":"data"}}}`},
		"/api/v1/persistentvolumes/pv-2":                  {200, `{"kind":"PersistentVolume","metadata":{"name":"pv-2"},"spec":{}}`},
		"/api/v1/persistentvolumes/pv-3":                  {404, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a, ok := answers[r.URL.Path]
		if !ok || r.Method != http.MethodGet || r.URL.RawQuery != "" {
			t.Errorf("asked %s %s", r.Method, r.URL)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(a.code)
		io.WriteString(w, a.body)
	}))
	defer server.Close()
	api, err := NewAPI("n1", &rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	publisher := NewPublisher(api, "n1", time.Now(), nil, nil)
	c := NewCluster(publisher, api, func() {})
	ctx := context.Background()

	if _, ok := c.Node(); ok {
		t.Error("a Node that has not been seen")
	}
	var n Node
	if err := json.Unmarshal([]byte(`{"metadata":{"name":"n1"},"status":{"nodeInfo":{"kubeletVersion":"v1.36.3"},"volumesAttached":[{"name":"kubernetes.io/csi/d^h","devicePath":"x"}],"volumesInUse":["kubernetes.io/csi/d^h","kubernetes.io/csi/d^i"]}}`), &n); err != nil {
		t.Fatal(err)
	}
	publisher.seen(&n)
	node, ok := c.Node()
	if d := cmp.Diff(probes.Node{Name: "n1", KubeletVersion: "v1.36.3", VolumesAttached: []string{"kubernetes.io/csi/d^h"}, VolumesInUse: []string{"kubernetes.io/csi/d^h", "kubernetes.io/csi/d^i"}}, node); d != "" || !ok {
		t.Errorf("%t %s", ok, d)
	}

	a, ok, err := c.Attachment(ctx, "csi-1")
	want := probes.Attachment{Volume: "pv-1", Attached: true, Deleting: true, DetachError: "busy", Metadata: map[string]string{"devicePath": "/dev/sdx"}}
	if d := cmp.Diff(want, a); d != "" || !ok || err != nil {
		t.Errorf("%t %v %s", ok, err, d)
	}
	if _, ok, err := c.Attachment(ctx, "csi-2"); ok || err != nil {
		t.Errorf("what there is not: %t, %v", ok, err)
	}
	if _, ok, err := c.Attachment(ctx, "csi-3"); ok || !apierrors.IsForbidden(err) {
		t.Errorf("what is forbidden: %t, %v", ok, err)
	}
	for volume, want := range map[string]string{"pv-1": "shop/data", "pv-2": "", "pv-3": ""} {
		if claim, err := c.Claim(ctx, volume); claim != want || err != nil {
			t.Errorf("claim of %s: %q, %v, want %q", volume, claim, err, want)
		}
	}
}
