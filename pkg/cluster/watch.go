package cluster

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
)

// settle is how long changes are gathered before they are shown: the kubelets of
// a large cluster write several times a second.
const settle = 500 * time.Millisecond

// redraw is how often what is known is shown again, because ages grow.
const redraw = 30 * time.Second

// View is what Watch follows.
type View struct {
	Nodes []corev1.Node
	// Pods are the agent's; nil while they are not known.
	Pods []corev1.Pod
	// Err is why the API server does not answer just now.
	Err error
}

// Watch follows the nodes that a selector selects and the agent's pods, by one
// watch each, and calls show with all of them after every change and now and
// then without one, until ctx ends.
func (c *Client) Watch(ctx context.Context, selector, namespace string, show func(View)) error {
	changed := make(chan struct{}, 1)
	notify := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	var mu sync.Mutex
	errs := map[string]error{}
	follow := func(resource, namespace, selector string, example runtime.Object) (cache.SharedIndexInformer, error) {
		source := cache.NewFilteredListWatchFromClient(c.rest, resource, namespace, func(o *metav1.ListOptions) { o.LabelSelector = selector })
		informer := cache.NewSharedIndexInformer(source, example, 0, cache.Indexers{})
		if err := informer.SetTransform(func(o any) (any, error) {
			if n, ok := o.(*corev1.Node); ok {
				slim(n)
			}
			return o, nil
		}); err != nil {
			return nil, err
		}
		if err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			mu.Lock()
			errs[resource] = err
			mu.Unlock()
			notify()
		}); err != nil {
			return nil, err
		}
		seen := func() {
			mu.Lock()
			delete(errs, resource)
			mu.Unlock()
			notify()
		}
		_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { seen() }, UpdateFunc: func(any, any) { seen() }, DeleteFunc: func(any) { seen() },
		})
		return informer, err
	}
	nodes, err := follow("nodes", "", selector, &corev1.Node{})
	if err != nil {
		return err
	}
	pods, err := follow("pods", namespace, agentPods, &corev1.Pod{})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, informer := range []cache.SharedIndexInformer{nodes, pods} {
		wg.Go(func() { informer.RunWithContext(ctx) })
	}
	// An empty list makes no event.
	wg.Go(func() {
		cache.WaitForCacheSync(ctx.Done(), nodes.HasSynced)
		notify()
		cache.WaitForCacheSync(ctx.Done(), pods.HasSynced)
		notify()
	})
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-time.After(redraw):
		}
		if nodes.HasSynced() {
			var v View
			for _, o := range nodes.GetStore().List() {
				v.Nodes = append(v.Nodes, *o.(*corev1.Node))
			}
			if pods.HasSynced() {
				v.Pods = []corev1.Pod{}
				for _, o := range pods.GetStore().List() {
					v.Pods = append(v.Pods, *o.(*corev1.Pod))
				}
			}
			mu.Lock()
			for _, resource := range []string{"pods", "nodes"} {
				if err := errs[resource]; err != nil {
					v.Err = wrap(err, "watching "+resource)
				}
			}
			mu.Unlock()
			show(v)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}
