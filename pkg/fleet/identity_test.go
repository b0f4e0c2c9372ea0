package fleet

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

func TestDuplicates(t *testing.T) {
	with := func(name, machine, uuid string) corev1.Node {
		n := node(name)
		n.Status.NodeInfo.MachineID, n.Status.NodeInfo.SystemUUID = machine, uuid
		return n
	}
	nodes := []corev1.Node{with("c", "aa", "4C4C4544-0042"), with("a", "bb", "4c4c4544-0042"), with("b", "aa", "x"), with("d", "", ""), with("e", "", "")}
	want := []Duplicate{
		{"machine-id", Hash("aa"), []string{"b", "c"}},
		{"product UUID", Hash("4c4c4544-0042"), []string{"a", "c"}},
	}
	if diff := cmp.Diff(want, NewReport(nodes, nil, now).DuplicateIdentities); diff != "" {
		t.Error(diff)
	}
}

func TestIdentitiesOfDrivers(t *testing.T) {
	n := storagev1.CSINode{}
	n.Spec.Drivers = []storagev1.CSINodeDriver{
		{Name: "csi.array.example", NodeID: "n1|IQN.1993-08.org.debian:01:abc|10.0.0.1"},
		{Name: "csi.nvme.example", NodeID: "nqn.2014-08.org.nvmexpress:uuid:1b4e28ba"},
		{Name: "csi.cloud.example", NodeID: "i-0123456789abcdef0"},
		{Name: "csi.short.example", NodeID: "iqn."},
	}
	want := Identities{
		"initiator name in CSINode of csi.array.example": Hash("iqn.1993-08.org.debian:01:abc"),
		"initiator name in CSINode of csi.nvme.example":  Hash("nqn.2014-08.org.nvmexpress:uuid:1b4e28ba"),
	}
	if diff := cmp.Diff(want, IdentitiesOfDrivers(n)); diff != "" {
		t.Error(diff)
	}
}

const page = `# HELP hosthygiene_iscsi_initiator_info The node's iSCSI initiator name.
# TYPE hosthygiene_iscsi_initiator_info gauge
hosthygiene_iscsi_initiator_info{hash="0123456789ab"} 1
hosthygiene_identity_info{kind="hostnqn",hash="aaaaaaaaaaaa"} 1
hosthygiene_identity_info{kind="old",hash="aaaaaaaaaaaa"} 0
hosthygiene_identity_info{kind="two",hash="a"} 1
hosthygiene_identity_info{kind="two",hash="b"} 1
hosthygiene_build_info{version="v0.1.0"} 1
hosthygiene_problem{probe="time",reason="NoTimeDaemon",severity="warning"} 0
go_info{version="go1.26"} 1
`

func TestIdentitiesOfMetrics(t *testing.T) {
	got, err := IdentitiesOfMetrics(strings.NewReader(page))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Identities{"iscsi_initiator": "0123456789ab", "identity hostnqn": "aaaaaaaaaaaa"}, got); diff != "" {
		t.Error(diff)
	}
	if _, err := IdentitiesOfMetrics(strings.NewReader(`hosthygiene_x_info{hash="unended`)); err == nil {
		t.Error("a broken line is taken")
	}
	if _, err := IdentitiesOfMetrics(strings.NewReader(strings.Repeat("hosthygiene_x_info{hash=\"a\"} 1\n", maxSamples+1))); err == nil {
		t.Error("a page without end is taken")
	}
}

func FuzzMetrics(f *testing.F) {
	f.Add(page)
	f.Add(deprecatedPage)
	f.Add(strings.Repeat("x", 70<<10) + "hosthygiene_x_info{hash=\"a\"} 1\n")
	f.Fuzz(func(t *testing.T, page string) {
		ids, err := IdentitiesOfMetrics(strings.NewReader(page))
		if err == nil && ids == nil {
			t.Error("neither an answer nor an error")
		}
		_, _ = DeprecatedAPIs(strings.NewReader(page))
	})
}
