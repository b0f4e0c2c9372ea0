package rigtest

import "strings"

// UnservedVolume is a volume of a driver that nobody serves, and a pod on a node
// that wants it: the attach/detach controller makes the VolumeAttachment and names
// it. Names are block.csi.example, pv-data, and data and db in the namespace default.
func UnservedVolume(node string) string {
	return strings.ReplaceAll(unservedVolume, "NODE", node)
}

const unservedVolume = `apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: block.csi.example}
spec: {attachRequired: true}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: pv-data}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Retain
  storageClassName: ""
  claimRef: {namespace: default, name: data}
  csi: {driver: block.csi.example, volumeHandle: array-7/vol-0123456789}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: default}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  volumeName: pv-data
  resources: {requests: {storage: 1Gi}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: default}
spec:
  nodeName: NODE
  terminationGracePeriodSeconds: 0
  containers: [{name: db, image: example.invalid/db, volumeMounts: [{name: data, mountPath: /data}]}]
  volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`
