//go:build cluster

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

// volumes: the real controller attaches a volume to the node, the real kubelet
// waits for it, and no driver brings it; then it is mounted as the kubelet mounts.
func (w *world) volumes(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.WriteConfig(t, "apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\ninterval: 3s\nhold: {AttachedVolumeMissing: {before: 3s}}\n")
	w.Await(t, "no problem of the disks", w.is("DiskProblem", corev1.ConditionFalse, "NoProblem"))
	manifest := filepath.Join(t.TempDir(), "volume.yaml")
	if err := os.WriteFile(manifest, []byte(rigtest.UnservedVolume(w.Node.Name())), 0o600); err != nil {
		t.Fatal(err)
	}
	w.Kubectl(t, "apply", "-f", manifest)
	uid := w.Kubectl(t, "get", "pod", "db", "-o", "jsonpath={.metadata.uid}")
	dir := "/var/lib/kubelet/pods/" + strings.TrimSpace(uid) + "/volumes/kubernetes.io~csi/pv-data"
	attachment := func() string {
		return strings.TrimSpace(w.Kubectl(t, "get", "volumeattachments", "-o", "jsonpath={.items[?(@.spec.source.persistentVolumeName==\"pv-data\")].metadata.name}"))
	}
	t.Cleanup(func() {
		ctx := w.CleanupContext(t)
		for _, args := range [][]string{
			{"delete", "pod", "db", "--force", "--grace-period=0", "--ignore-not-found"},
			{"delete", "--wait=false", "--ignore-not-found", "-f", manifest},
			{"delete", "volumeattachments", "--all", "--wait=false"},
		} {
			if out, err := w.ControlPlane.KubectlCommand(ctx, args...).CombinedOutput(); err != nil {
				t.Errorf("kubectl %s: %v: %s", strings.Join(args, " "), err, out)
			}
		}
		if _, err := w.TryGuest(ctx, "mountpoint -q "+dir+"/mount && umount "+dir+"/mount; rm -rf "+dir); err != nil {
			t.Error(err)
		}
	})
	var name string
	w.Await(t, "the attachment", func() error {
		if name = attachment(); name == "" {
			return fmt.Errorf("the controller has made none")
		}
		return nil
	})
	// What external-attacher does for a driver.
	w.Kubectl(t, "patch", "volumeattachment", name, "--subresource=status", "--type=merge", "-p", `{"status": {"attached": true}}`)
	w.Await(t, "the missing volume", func() error {
		all := w.all()
		if err := all.Is("DiskProblem", corev1.ConditionTrue, "AttachedVolumeMissing"); err != nil {
			return err
		}
		if said := all["DiskProblem"].Message; !strings.Contains(said, "PersistentVolume pv-data (claim default/data, block.csi.example)") {
			return fmt.Errorf("the condition says %q", said)
		}
		return nil
	})
	w.Guest(t, "mkdir -p "+dir+"/mount; mount -t tmpfs tmpfs "+dir+"/mount; cat >"+dir+"/vol_data.json <<'END'\n"+
		`{"attachmentID":"`+name+`","driverName":"block.csi.example","nodeName":"`+w.Node.Name()+`","specVolID":"pv-data","volumeHandle":"array-7/vol-0123456789","volumeLifecycleMode":"Persistent"}`+"\nEND\n")
	w.Await(t, "the volume to be found", w.is("DiskProblem", corev1.ConditionFalse, "NoProblem"))
}
