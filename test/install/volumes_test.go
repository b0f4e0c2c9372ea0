//go:build cluster

package install

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/report"
	"github.com/hosthygiene/agent/test/rig"
	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const (
	volumeName = "kubernetes.io/csi/block.csi.example^array-7/vol-0123456789"
	// emptyHost runs a kubelet that has mounted nothing.
	emptyHost = `
-- os --
kernel=6.12.0
-- procs --
1 systemd
640 kubelet start=900
-- treebin/proc/640/cmdline --
/usr/bin/kubelet\x00
-- tree/proc/640/cgroup --
0::/system.slice/kubelet.service
-- units --
*
-- statmount --
* dev=0:0
-- dirs --
/sys/block
/sys/dev/block
-- tree/proc/1/mountinfo --
29 1 0:30 / / rw,relatime shared:1 - overlay overlay rw
`
	volumeDir  = "/var/lib/kubelet/pods/f39a9895-89b1-4487-a4ce-f04d831b5508/volumes/kubernetes.io~csi/pv-data"
	withVolume = emptyHost + "30 29 0:77 / " + volumeDir + "/mount rw - tmpfs tmpfs rw\n-- tree" + volumeDir + `/vol_data.json --
{"attachmentID":"csi-0","driverName":"block.csi.example","nodeName":"host","specVolID":"pv-data","volumeHandle":"array-7/vol-0123456789","volumeLifecycleMode":"Persistent"}
`
)

// countingCluster counts what the API server is asked for.
type countingCluster struct {
	probes.Cluster
	asked int
}

func (c *countingCluster) Attachment(ctx context.Context, name string) (probes.Attachment, bool, error) {
	c.asked++
	return c.Cluster.Attachment(ctx, name)
}

func (c *countingCluster) Claim(ctx context.Context, volume string) (string, error) {
	c.asked++
	return c.Cluster.Claim(ctx, volume)
}

// volumesAreCompared lets the disks probe, with the agent's rights, hold what the
// real controller attaches against hosts that have it and have it not.
func volumesAreCompared(t *testing.T, cp *rig.ControlPlane) {
	ctx := t.Context()
	kubectl := func(stdin string, args ...string) {
		t.Helper()
		cmd := cp.KubectlCommand(ctx, args...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("kubectl %v: %v: %s", args, err, out)
		}
	}
	config, err := clientcmd.BuildConfigFromFlags("", cp.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	config.Impersonate = rest.ImpersonationConfig{UserName: agent, Groups: []string{"system:serviceaccounts", "system:authenticated"}}
	api, err := report.NewAPI("host", config)
	if err != nil {
		t.Fatal(err)
	}
	publisher := report.NewPublisher(api, "host", time.Now().Add(-time.Hour), slog.New(slog.DiscardHandler), nil)
	following, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { publisher.Run(following) })
	defer wg.Wait()
	defer stop()
	cluster := &countingCluster{Cluster: report.NewCluster(publisher, api, func() { publisher.WaitKnown(ctx) })}

	kubectl("", "annotate", "node", "host", "volumes.kubernetes.io/controller-managed-attach-detach=true")
	kubectl(rigtest.UnservedVolume("host"), "apply", "-f", "-")
	defer func() { // whatever happened: what comes after has no use for a node with a volume
		cp.KubectlCommand(context.WithoutCancel(ctx), "delete", "--wait=false", "pod/db", "pvc/data", "pv/pv-data", "csidriver/block.csi.example").Run()
	}()

	// look makes passes, a minute apart, until one finds what is wanted.
	look := func(what, hostText, want string) {
		t.Helper()
		h := hosttest.Parse(t, hostText)
		in := probes.Input{Host: h, Cluster: cluster, Memory: probes.NewMemory(), Now: time.Now()}
		var got string
		for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(300 * time.Millisecond) {
			in.Now = in.Now.Add(time.Minute)
			in.Memory.Begin()
			r, err := probes.DefaultDisks().Check(ctx, in)
			if got = fmt.Sprint(r.Findings); err != nil {
				got += " " + err.Error()
			}
			if !strings.Contains(got, want) || len(r.Findings) > 1 || want == "" && len(r.Findings) > 0 {
				continue
			}
			// Nothing has changed, so nothing is asked.
			before := cluster.asked
			for range 5 {
				in.Now = in.Now.Add(time.Minute)
				in.Memory.Begin()
				again, err := probes.DefaultDisks().Check(ctx, in)
				if err != nil || finding.StatusOf(again, err) != finding.StatusOf(r, nil) {
					t.Errorf("%s: another pass: %v, %v", what, again.Findings, err)
				}
			}
			if cluster.asked != before {
				t.Errorf("%s: the API server was asked %d times while nothing changed", what, cluster.asked-before)
			}
			t.Logf("%s: %s", what, got)
			return
		}
		t.Fatalf("%s: got %s, want %q", what, got, want)
	}
	attachments := func() []string {
		t.Helper()
		out, err := cp.Kubectl(ctx, "get", "volumeattachments", "-o", "jsonpath={.items[*].metadata.name}")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(out)
	}
	status := func(kind, name string, value any) {
		t.Helper()
		patch, err := json.Marshal(map[string]any{"status": value})
		if err != nil {
			t.Fatal(err)
		}
		kubectl("", "patch", kind, name, "--subresource=status", "--type=merge", "-p", string(patch))
	}

	// The controller attaches, and a driver says that it has.
	var names []string
	for deadline := time.Now().Add(60 * time.Second); len(names) == 0 && time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		names = attachments()
	}
	if len(names) != 1 {
		t.Fatalf("the controller made the attachments %v, want one", names)
	}
	status("node", "host", map[string]any{"volumesInUse": []string{volumeName}})
	status("volumeattachment", names[0], map[string]any{"attached": true, "attachmentMetadata": map[string]string{"devicePath": "/dev/sdx"}})
	look("attached, wanted and not here", emptyHost, "AttachedVolumeMissing pv-data: PersistentVolume pv-data (claim default/data, block.csi.example) is attached to this node")
	asked := cluster.asked
	look("attached, wanted and here", withVolume, "")
	if cluster.asked != asked {
		t.Errorf("asked the API server %d times, though all is well", cluster.asked-asked)
	}

	// Who may get may not list, and asks in vain for what it can not name.
	if v, err := api.VolumeAttachment(ctx, "csi-0"); v != nil || err != nil {
		t.Errorf("an attachment that there is not: %v, %v", v, err)
	}
	if claim, err := api.Claim(ctx, "pv-none"); claim != "" || err != nil {
		t.Errorf("a volume that there is not: %q, %v", claim, err)
	}
	config.Impersonate.UserName = "system:serviceaccount:default:default"
	stranger, err := report.NewAPI("host", config)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stranger.VolumeAttachment(ctx, names[0]); !apierrors.IsForbidden(err) {
		t.Errorf("without the agent's rights: %v", err)
	}

	// The attachment is taken away while the volume is mounted: the controller
	// waits for the kubelet for six minutes, an administrator need not.
	kubectl("", "delete", "pod", "db", "--force", "--grace-period=0")
	kubectl("", "delete", "volumeattachment", names[0])
	status("node", "host", map[string]any{"volumesAttached": nil})
	look("mounted and taken away", withVolume, "MountedVolumeDetached pv-data: PersistentVolume pv-data (claim default/data, block.csi.example) is mounted for a pod")
	status("node", "host", map[string]any{"volumesInUse": nil})
	look("given up", emptyHost, "")
}
