package main

import (
	"crypto/sha256"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/hosthygiene/agent/pkg/report"
)

// object is the Node as its kubelet left it, and an agent before this one where
// there was one. What a write costs goes with the size of the whole Node, so it has what makes real
// ones large: 50 images (the kubelet's default of nodeStatusMaxImages) above all.
func (a *agent) object(lived bool, written time.Time) *corev1.Node {
	now, before := metav1.Now(), metav1.NewTime(time.Now().Add(-20*time.Hour))
	n := &corev1.Node{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{
			Name: a.name,
			Labels: map[string]string{
				"beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "beta.kubernetes.io/instance-type": "storage.4xlarge",
				"kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux", "kubernetes.io/hostname": a.name,
				"node.kubernetes.io/instance-type": "storage.4xlarge",
				"topology.kubernetes.io/region":    "region-1", "topology.kubernetes.io/zone": fmt.Sprintf("region-1%c", 'a'+a.number%3),
				"pool": "storage",
			},
			Annotations: map[string]string{
				"node.alpha.kubernetes.io/ttl": "0", "volumes.kubernetes.io/controller-managed-attach-detach": "true",
				"csi.volume.kubernetes.io/nodeid": `{"csi.example.com":"` + a.name + `","nfs.csi.example.com":"` + a.name + `"}`,
			},
		},
		Spec: corev1.NodeSpec{
			PodCIDR: fmt.Sprintf("10.%d.%d.0/24", 128+a.number/256, a.number%256), ProviderID: "example://region-1/" + a.name,
		},
		Status: corev1.NodeStatus{
			Addresses: []corev1.NodeAddress{
				{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("10.64.%d.%d", a.number/256, a.number%256)},
				{Type: corev1.NodeHostName, Address: a.name},
			},
			Capacity: resources("16", "65536Mi", "110"), Allocatable: resources("15890m", "62000Mi", "110"),
			DaemonEndpoints: corev1.NodeDaemonEndpoints{KubeletEndpoint: corev1.DaemonEndpoint{Port: 10250}},
			NodeInfo: corev1.NodeSystemInfo{
				MachineID: fmt.Sprintf("%032x", a.number), SystemUUID: fmt.Sprintf("%036x", a.number), BootID: fmt.Sprintf("%036x", a.number),
				KernelVersion: "6.12.48-amd64", OSImage: "Debian GNU/Linux 13 (trixie)", ContainerRuntimeVersion: "containerd://1.7.24",
				KubeletVersion: "v1.36.3", OperatingSystem: "linux", Architecture: "amd64",
			},
		},
	}
	for _, c := range []struct{ t, status, reason, message string }{
		{"NetworkUnavailable", "False", "RouteCreated", "the network is set up on this node"},
		{"MemoryPressure", "False", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"},
		{"DiskPressure", "False", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"},
		{"PIDPressure", "False", "KubeletHasSufficientPID", "kubelet has sufficient PID available"},
		{"Ready", "True", "KubeletReady", "kubelet is posting ready status"},
	} {
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeConditionType(c.t), Status: corev1.ConditionStatus(c.status),
			Reason: c.reason, Message: c.message, LastHeartbeatTime: now, LastTransitionTime: before})
	}
	for _, c := range report.Conditions(a.snapshot(1000)) {
		if !lived {
			break
		}
		n.Status.Conditions = append(n.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeConditionType(c.Type), Status: corev1.ConditionStatus(c.Status),
			Reason: c.Reason, Message: c.Message, LastHeartbeatTime: metav1.NewTime(written), LastTransitionTime: before})
	}
	for i := range 50 {
		n.Status.Images = append(n.Status.Images, corev1.ContainerImage{SizeBytes: int64(i+1) << 22, Names: []string{
			fmt.Sprintf("registry.example.com/platform/component-%02d@sha256:%x", i, sha256.Sum256([]byte{byte(i)})),
			fmt.Sprintf("registry.example.com/platform/component-%02d:v1.%d.0", i, i),
		}})
	}
	return n
}

func resources(cpu, memory, pods string) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory), corev1.ResourcePods: resource.MustParse(pods),
		corev1.ResourceEphemeralStorage: resource.MustParse("200Gi"), "hugepages-1Gi": resource.MustParse("0"), "hugepages-2Mi": resource.MustParse("0"),
	}
}

func (a *agent) podName() string { return account + "-" + a.name }

// pod is what the agent's token is bound to. Without the priority class of the
// manifests: no controller fills in the quota that it is counted by.
func (a *agent) pod() *corev1.Pod {
	return &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: a.podName(), Namespace: namespace, Labels: map[string]string{"app.kubernetes.io/name": account}},
		Spec: corev1.PodSpec{NodeName: a.name, ServiceAccountName: account, HostNetwork: true,
			Containers: []corev1.Container{{Name: "agent", Image: "registry.example.com/agent"}}},
	}
}
