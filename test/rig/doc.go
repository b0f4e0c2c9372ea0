// Package rig runs a real Kubernetes cluster with a real node on one machine,
// so that tests can ask what the agent does on an API server that checks RBAC
// and on a host that has multipath, iSCSI, chrony and a kubelet of its own.
//
// Nothing here is a fake. The control plane is etcd and the Kubernetes
// programs, compiled from the module in test/tools. The node is a Debian
// virtual machine under QEMU, whose faults (a path taken offline, a disk pulled
// out, a target that dies) are made the way they happen to hardware. What a
// fake would have to guess, such as which uevent follows a lost path, is
// exactly what these tests are for.
//
// The pieces, each of which can be used without the ones after it:
//
//	tools, err := rig.BuildTools(ctx)
//	cp, err := rig.StartControlPlane(ctx, dir, tools, rig.ControlPlaneOptions{})
//	image, err := rig.BuildNodeImage(ctx, tools)
//	node, err := rig.StartNode(ctx, cp, image, rig.NodeOptions{})
//
// Everything listens on the loopback only, on ports that were free, and every
// process is stopped by the handle that started it. Should the test process die
// without stopping them, the kernel kills them with it.
//
// Expensive products (the compiled programs, the node's disk image) are kept in
// a cache folder named by HYGIENE_CACHE, or in the user's cache folder, under a
// key made of everything that went into them.
package rig
