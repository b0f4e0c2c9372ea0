package report

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/hosthygiene/agent/pkg/probes"
)

// carriers lists the nodes that have conditions of ours.
func (a *API) carriers(ctx context.Context) (map[string][]string, error) {
	found := map[string][]string{}
	next := ""
	for {
		var list struct {
			Metadata struct {
				Continue string `json:"continue"`
			} `json:"metadata"`
			Items []Node `json:"items"`
		}
		err := a.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
			raw, err := c.Get().Resource("nodes").Param("limit", "100").Param("continue", next).DoRaw(ctx)
			if err != nil {
				return err
			}
			return json.Unmarshal(raw, &list)
		})
		if err != nil {
			return nil, err
		}
		for _, n := range list.Items {
			for _, c := range n.Status.Conditions {
				if strings.HasPrefix(c.Type, probes.ConditionPrefix) {
					found[n.Metadata.Name] = append(found[n.Metadata.Name], c.Type)
				}
			}
		}
		if next = list.Metadata.Continue; next == "" {
			return found, nil
		}
	}
}

// CleanupAll deletes the agent's conditions from every Node and returns the
// nodes where some are left. out is told what is done.
func CleanupAll(ctx context.Context, c *rest.Config, out io.Writer) (left []string, err error) {
	api, err := NewAPI("", c)
	if err != nil {
		return nil, err
	}
	found, err := api.carriers(ctx)
	if err != nil {
		return nil, err
	}
	for node, conditions := range found {
		var patch []map[string]any
		for _, t := range conditions {
			patch = append(patch, map[string]any{"$patch": "delete", "type": t})
		}
		body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": patch}})
		if err != nil {
			return nil, err
		}
		err = api.do(ctx, requestTimeout, func(ctx context.Context, c *rest.RESTClient) error {
			return c.Patch(types.StrategicMergePatchType).Resource("nodes").Name(node).SubResource("status").Body(body).Do(ctx).Error()
		})
		if err != nil {
			fmt.Fprintf(out, "%s: %v\n", node, err)
			left = append(left, node)
			continue
		}
		fmt.Fprintf(out, "%s: deleted %s\n", node, strings.Join(conditions, ", "))
	}
	return left, nil
}

// WaitClean waits until no Node has a condition of the agent's, and returns the
// nodes that still have when ctx ends.
func WaitClean(ctx context.Context, c *rest.Config) (left []string, err error) {
	api, err := NewAPI("", c)
	if err != nil {
		return nil, err
	}
	for {
		found, err := api.carriers(ctx)
		switch {
		case err != nil && ctx.Err() == nil && !retryable(err):
			return nil, err
		case err == nil && len(found) == 0:
			return nil, nil
		case err == nil:
			left = left[:0]
			for node := range found {
				left = append(left, node)
			}
		}
		select {
		case <-ctx.Done():
			return left, nil
		case <-time.After(2 * time.Second):
		}
	}
}
