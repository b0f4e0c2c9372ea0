package report

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
)

// leaseServer answers every request with one text, and keeps the requests.
func leaseServer(t *testing.T, code int, answer string) (*API, *[]string) {
	t.Helper()
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		asked = append(asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+string(body)))
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		io.WriteString(w, answer)
	}))
	t.Cleanup(server.Close)
	api, err := NewAPI("n1", &rest.Config{Host: server.URL + "/behind/a/proxy"})
	if err != nil {
		t.Fatal(err)
	}
	return api, &asked
}

func TestLeaseRequests(t *testing.T) {
	api, asked := leaseServer(t, http.StatusOK, `{"kind":"Lease","metadata":{"name":"slot","resourceVersion":"8","annotations":{"a":"b"}},
		"spec":{"holderIdentity":"n2","leaseDurationSeconds":60,"renewTime":"2026-11-21T23:00:00.123456Z","leaseTransitions":3}}`)
	l, err := api.GetLease(t.Context(), "ns", "slot")
	if err != nil {
		t.Fatal(err)
	}
	if l.Spec.HolderIdentity != "n2" || l.Spec.LeaseDurationSeconds != 60 || l.Spec.LeaseTransitions != 3 || l.Metadata.ResourceVersion != "8" || l.Spec.RenewTime.Nanosecond() != 123456000 {
		t.Errorf("%+v", l)
	}
	l = &Lease{Metadata: LeaseMetadata{Name: "slot", Namespace: "ns", ResourceVersion: "8"}}
	for _, write := range []func(context.Context, *Lease) (*Lease, error){api.CreateLease, api.UpdateLease} {
		if after, err := write(t.Context(), l); err != nil || after.Metadata.ResourceVersion != "8" {
			t.Errorf("%+v, %v", after, err)
		}
	}
	const path, body = "/behind/a/proxy/apis/coordination.k8s.io/v1/namespaces/ns/leases",
		`{"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"slot","namespace":"ns","resourceVersion":"8"},"spec":{"holderIdentity":""}}`
	want := []string{"GET " + path + "/slot", "POST " + path + " " + body, "PUT " + path + "/slot " + body}
	if d := cmp.Diff(want, *asked); d != "" {
		t.Error(d)
	}
	if n := api.Writes()[[2]string{"leases", "ok"}]; n != 2 {
		t.Errorf("%d writes counted", n)
	}
}

// What the server says about a refusal is what the operator reads.
func TestLeaseErrors(t *testing.T) {
	api, _ := leaseServer(t, http.StatusConflict, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Conflict","code":409,"message":"somebody was faster"}`)
	_, err := api.UpdateLease(t.Context(), &Lease{})
	if !apierrors.IsConflict(err) || err.Error() != "somebody was faster" {
		t.Errorf("%v", err)
	}
	if n := api.Writes()[[2]string{"leases", "Conflict"}]; n != 1 {
		t.Errorf("writes %v", api.Writes())
	}
	api, _ = leaseServer(t, http.StatusNotFound, "404 page not found")
	if _, err := api.GetLease(t.Context(), "ns", "slot"); !apierrors.IsNotFound(err) {
		t.Errorf("%v", err)
	}
}
