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

// A volume of a driver that nobody serves, and a pod that wants it.
const unservedVolume = `apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: e2e.csi.example}
spec: {attachRequired: true}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: pv-e2e}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  claimRef: {namespace: default, name: e2e}
  csi: {driver: e2e.csi.example, volumeHandle: array-7/vol-0123456789}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: e2e, namespace: default}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  volumeName: pv-e2e
  resources: {requests: {storage: 1Gi}}
---
apiVersion: v1
kind: Pod
metadata: {name: e2e-db, namespace: default}
spec:
  nodeName: %s
  terminationGracePeriodSeconds: 0
  containers: [{name: db, image: example.invalid/db, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: e2e}}]
`

// volumes: the real controller attaches a volume to the node, the real kubelet
// waits for it, and no driver brings it; then it is mounted as the kubelet mounts.
func (w *world) volumes(t *testing.T) {
	rigtest.OnFailure(t, w.dump)
	w.WriteConfig(t, "apiVersion: hosthygiene.io/v1alpha1\nkind: AgentConfig\ninterval: 3s\nhold: {AttachedVolumeMissing: {before: 3s}}\n")
	w.Await(t, "no problem of the disks", w.is("DiskProblem", corev1.ConditionFalse, "NoProblem"))
	manifest := filepath.Join(t.TempDir(), "volume.yaml")
	if err := os.WriteFile(manifest, fmt.Appendf(nil, unservedVolume, w.Node.Name()), 0o600); err != nil {
		t.Fatal(err)
	}
	w.Kubectl(t, "apply", "-f", manifest)
	uid := w.Kubectl(t, "get", "pod", "e2e-db", "-o", "jsonpath={.metadata.uid}")
	dir := "/var/lib/kubelet/pods/" + strings.TrimSpace(uid) + "/volumes/kubernetes.io~csi/pv-e2e"
	attachment := func() string {
		return strings.TrimSpace(w.Kubectl(t, "get", "volumeattachments", "-o", "jsonpath={.items[?(@.spec.source.persistentVolumeName==\"pv-e2e\")].metadata.name}"))
	}
	t.Cleanup(func() {
		ctx := w.CleanupContext(t)
		for _, args := range [][]string{
			{"delete", "pod", "e2e-db", "--force", "--grace-period=0", "--ignore-not-found"},
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
		if said := all["DiskProblem"].Message; !strings.Contains(said, "PersistentVolume pv-e2e (claim default/e2e, e2e.csi.example)") {
			return fmt.Errorf("the condition says %q", said)
		}
		return nil
	})
	w.Guest(t, "mkdir -p "+dir+"/mount; mount -t tmpfs tmpfs "+dir+"/mount; cat >"+dir+"/vol_data.json <<'END'\n"+
		`{"attachmentID":"`+name+`","driverName":"e2e.csi.example","nodeName":"`+w.Node.Name()+`","specVolID":"pv-e2e","volumeHandle":"array-7/vol-0123456789","volumeLifecycleMode":"Persistent"}`+"\nEND\n")
	w.Await(t, "the volume to be found", w.is("DiskProblem", corev1.ConditionFalse, "NoProblem"))
}
