//go:build cluster

package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// plugin: what kubectl hygiene needs a kubelet for: the agent's answer by exec, and
// its metrics through the API server. The rest is proven in test/install.
func (w *world) plugin(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.Await(t, "every condition to be healthy", w.healthy)
	program := filepath.Join(t.TempDir(), "kubectl-hygiene")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../cmd/kubectl-hygiene")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	run := func(args ...string) (string, int) {
		t.Helper()
		out, err := exec.CommandContext(t.Context(), program, append(args, "--kubeconfig", w.ControlPlane.Kubeconfig())...).CombinedOutput()
		if exit := new(exec.ExitError); errors.As(err, &exit) {
			return string(out), exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		return string(out), 0
	}
	name := w.Node.Name()
	if out, code := run(); code != 0 || !regexp.MustCompile(`(?m)^`+name+` +True +ok +ok `).MatchString(out) {
		t.Errorf("kubectl hygiene exits with %d:\n%s", code, out)
	}
	out, code := run("explain", name, "time")
	t.Logf("kubectl hygiene explain %s time\n%s", name, out)
	if code != 0 || !strings.Contains(out, "settings in force") || !strings.Contains(out, "maxOffset:") {
		t.Errorf("explain exits with %d:\n%s", code, out)
	}
	if out, code := run("explain", name, "nonsense"); code != 2 || !strings.Contains(out, `no probe "nonsense": want one of `) {
		t.Errorf("explain of no probe exits with %d: %s", code, out)
	}
	if out, code := run("identities"); code != 0 || !strings.Contains(out, "iscsi_initiator of 1 node") {
		t.Errorf("identities exits with %d:\n%s", code, out)
	}
	w.Spent("kubectl hygiene")
}
