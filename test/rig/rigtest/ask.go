package rigtest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// ConditionPrefix is what the type of every condition of ours begins with.
const ConditionPrefix = "hosthygiene.io/"

// Kubectl runs kubectl as the administrator and returns what it printed.
func (c *Cluster) Kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := c.ControlPlane.Kubectl(c.CleanupContext(t), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies an object that is not in a file.
func (c *Cluster) Apply(t *testing.T, object any) {
	t.Helper()
	data, err := json.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	cmd := c.ControlPlane.KubectlCommand(c.CleanupContext(t), "apply", "-f", "-")
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("kubectl apply: %v: %s", err, out)
	}
}

// Guest runs a shell script on the node as root and returns what it printed; the
// script ends at the first command that fails.
func (c *Cluster) Guest(t *testing.T, script string) string {
	t.Helper()
	out, err := c.TryGuest(c.CleanupContext(t), script)
	if err != nil {
		t.Fatalf("on the node: %v\n%s\n%s", err, script, out[max(0, len(out)-2000):])
	}
	return out
}

// TryGuest is Guest where a failure is no surprise.
func (c *Cluster) TryGuest(ctx context.Context, script string) (string, error) {
	out, err := c.Node.Run(ctx, "set -e\n"+script)
	return strings.TrimSpace(out), err
}

// Open asks the API server as the administrator, for an answer that may go on as
// long as ctx does: a watch. Any status but 200 is an error that names it.
func (c *Cluster) Open(ctx context.Context, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.ControlPlane.Server()+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer resp.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 300))
		return nil, fmt.Errorf("GET %s: %s: %s", path, resp.Status, body)
	}
	return resp.Body, nil
}

// Read is Open for an answer that comes at once.
func (c *Cluster) Read(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	body, err := c.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return io.ReadAll(body)
}

// Get is Read for an object.
func (c *Cluster) Get(ctx context.Context, path string, into any) error {
	body, err := c.Read(ctx, path)
	if err != nil {
		return err
	}
	return json.Unmarshal(body, into)
}

// Conditions are those of ours on a Node, by their type without the prefix.
type Conditions map[string]corev1.NodeCondition

// Is says why a condition does not have a status and one of the given reasons,
// any without one.
func (all Conditions) Is(kind string, status corev1.ConditionStatus, reasons ...string) error {
	c, ok := all[kind]
	switch {
	case !ok:
		return fmt.Errorf("there is no %s", kind)
	case c.Status != status || len(reasons) > 0 && !slices.Contains(reasons, c.Reason):
		return fmt.Errorf("%s is %s/%s: %s", kind, c.Status, c.Reason, c.Message)
	}
	return nil
}

// Healthy says which of the given conditions is not there or tells of a problem,
// and whether Ready does.
func (all Conditions) Healthy(kinds ...string) error {
	var errs []error
	for _, kind := range kinds {
		errs = append(errs, all.Is(kind, corev1.ConditionFalse))
	}
	return errors.Join(append(errs, all.Is("Ready", corev1.ConditionTrue))...)
}

func (all Conditions) String() string {
	var b strings.Builder
	for kind, c := range all {
		fmt.Fprintf(&b, "%s %s/%s since %s: %s\n", kind, c.Status, c.Reason, c.LastTransitionTime.UTC().Format(time.TimeOnly), c.Message)
	}
	return b.String()
}
