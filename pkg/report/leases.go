package report

import (
	"context"
	"encoding/json"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// Lease is the part of a coordination.k8s.io/v1 Lease that nodes agree by. What
// is not here is dropped by an update; nobody but the agents writes these Leases.
type Lease struct {
	Metadata LeaseMetadata `json:"metadata"`
	Spec     LeaseSpec     `json:"spec"`
}

// LeaseMetadata is what a Lease is found by, and the version that an update is
// conditional on.
type LeaseMetadata struct {
	Name            string            `json:"name"`
	Namespace       string            `json:"namespace"`
	ResourceVersion string            `json:"resourceVersion,omitempty"`
	Labels          map[string]string `json:"labels,omitempty"`
	Annotations     map[string]string `json:"annotations,omitempty"`
}

// LeaseSpec says who holds it, and for how long without a renewal.
type LeaseSpec struct {
	// HolderIdentity is the name of the Node whose agent holds it; empty when
	// nobody does.
	HolderIdentity       string            `json:"holderIdentity"`
	LeaseDurationSeconds int32             `json:"leaseDurationSeconds,omitempty"`
	AcquireTime          *metav1.MicroTime `json:"acquireTime,omitempty"`
	RenewTime            *metav1.MicroTime `json:"renewTime,omitempty"`
	LeaseTransitions     int32             `json:"leaseTransitions,omitempty"`
}

// GetLease reads a Lease as it is now, never from a cache. A missing one is the
// API's NotFound.
func (a *API) GetLease(ctx context.Context, namespace, name string) (*Lease, error) {
	return a.lease(ctx, func(c *rest.RESTClient) *rest.Request {
		return leases(c.Get(), namespace, name)
	})
}

// CreateLease creates a Lease; one that exists already is the API's AlreadyExists.
func (a *API) CreateLease(ctx context.Context, l *Lease) (*Lease, error) {
	return a.writeLease(ctx, l, func(c *rest.RESTClient) *rest.Request {
		return leases(c.Post(), l.Metadata.Namespace)
	})
}

// UpdateLease replaces a Lease if it still is at the version that l names, and
// fails with the API's Conflict if it is not.
func (a *API) UpdateLease(ctx context.Context, l *Lease) (*Lease, error) {
	return a.writeLease(ctx, l, func(c *rest.RESTClient) *rest.Request {
		return leases(c.Put(), l.Metadata.Namespace, l.Metadata.Name)
	})
}

// leases addresses another API group than the one the client was made for.
func leases(r *rest.Request, namespace string, name ...string) *rest.Request {
	return r.AbsPath(append([]string{"/apis/coordination.k8s.io/v1/namespaces", namespace, "leases"}, name...)...)
}

func (a *API) writeLease(ctx context.Context, l *Lease, request func(*rest.RESTClient) *rest.Request) (*Lease, error) {
	body, err := json.Marshal(struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		*Lease
	}{"coordination.k8s.io/v1", "Lease", l})
	if err != nil {
		return nil, err
	}
	out, err := a.lease(ctx, func(c *rest.RESTClient) *rest.Request { return request(c).Body(body) })
	a.count("leases", err)
	return out, err
}

func (a *API) lease(ctx context.Context, request func(*rest.RESTClient) *rest.Request) (*Lease, error) {
	var l Lease
	err := a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
		raw, err := answer(ctx, request(c))
		if err != nil {
			return err
		}
		return json.Unmarshal(raw, &l)
	})
	if err != nil {
		return nil, err
	}
	return &l, nil
}
