{{- define "ray.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "ray.selector" -}}
{app.kubernetes.io/name: lt-sglang, app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}, app.kubernetes.io/component: {{ index . 1 }}}
{{- end }}

{{- define "ray.meta" -}}
name: {{ include "ray.name" (index . 0) }}{{ index . 1 }}
namespace: {{ (index . 0).Release.Namespace | quote }}
labels: {app.kubernetes.io/name: lt-sglang, app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}, app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}, helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version }}}
{{- end }}

{{- /* The Serve application: what `serve deploy` takes. */ -}}
{{- define "ray.serve" -}}
{{- $a := .Values.application -}}
http_options:
  host: 0.0.0.0
  port: 8000
  request_timeout_s: null   # how long a generation may take is the client's to say
applications:
  - name: lt-sglang
    route_prefix: /
    import_path: deploy.ray.app:build
    args:
      model: {{ $a.model | quote }}
      tp: {{ int $a.tensorParallel }}
      cpus: {{ int $a.cpus }}
      replicas: [{{ int $a.minReplicas }}, {{ int $a.maxReplicas }}]
      requests_per_replica: {{ int $a.requestsPerReplica }}
      drain_seconds: {{ int $a.drainSeconds }}
      args:
        {{- range $a.args }}
        - {{ . | quote }}
        {{- end }}
{{- end }}

{{- define "ray.container" -}}
image: {{ .Values.image | quote }}
securityContext:
  allowPrivilegeEscalation: false
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "ray.pod" -}}
automountServiceAccountToken: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- /* Seconds that a worker's pod has: its drain, and what Serve and SGLang need around it. */ -}}
{{- define "ray.grace" -}}{{ add .Values.application.drainSeconds 120 }}{{- end }}

{{- define "ray.cluster" -}}
{{- $n := .Values.node -}}
rayVersion: {{ .Values.rayVersion | quote }}
enableInTreeAutoscaling: true
autoscalerOptions:
  idleTimeoutSeconds: 1800
  resources:
    requests: {cpu: 500m, memory: 1Gi}
    limits: {cpu: 500m, memory: 1Gi}
{{- if .Values.auth }}
authOptions: {mode: token}
{{- end }}
{{- with .Values.redis.address }}
gcsFaultToleranceOptions:
  redisAddress: {{ . | quote }}
  {{- with $.Values.redis.secret }}
  redisPassword: {valueFrom: {secretKeyRef: {name: {{ . | quote }}, key: password}}}
  {{- end }}
{{- end }}
headGroupSpec:
  # It steers and holds no engine.
  rayStartParams: {num-cpus: "2", num-gpus: "0", dashboard-host: 0.0.0.0}
  template:
    metadata:
      labels: {{ include "ray.selector" (list . "ray-head") }}
    spec:
      {{- include "ray.pod" . | replace "automountServiceAccountToken: false" "automountServiceAccountToken: true   # the autoscaler in this pod asks for more" | nindent 6 }}
      containers:
        - name: ray-head
          {{- include "ray.container" . | nindent 10 }}
          ports:
            - {name: gcs, containerPort: 6379}
            - {name: dashboard, containerPort: 8265}
            - {name: client, containerPort: 10001}
            - {name: serve, containerPort: 8000}
            - {name: ray-metrics, containerPort: 8080}
          resources:
            requests: {cpu: "4", memory: 16Gi}
            limits: {cpu: "4", memory: 16Gi}
          volumeMounts:
            - {name: scratch, mountPath: /scratch}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - {name: scratch, emptyDir: {sizeLimit: 10Gi}}
        - {name: tmp, emptyDir: {sizeLimit: 20Gi}}
workerGroupSpecs:
  - groupName: gpu
    replicas: {{ max 1 (int $n.min) }}
    minReplicas: {{ int $n.min }}
    maxReplicas: {{ int $n.max }}
    rayStartParams: {num-gpus: {{ int $n.gpus | quote }}}
    template:
      metadata:
        labels: {{ include "ray.selector" (list . "engine") }}
      spec:
        {{- include "ray.pod" . | nindent 8 }}
        terminationGracePeriodSeconds: {{ include "ray.grace" . }}
        {{- with $n.gpuProduct }}
        nodeSelector: {nvidia.com/gpu.product: {{ . | quote }}}
        {{- end }}
        tolerations:
          - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
        containers:
          - name: ray-worker
            {{- include "ray.container" . | nindent 12 }}
            env:
              - {name: FLASHINFER_WORKSPACE_BASE, value: /scratch/flashinfer}
              - {name: TRITON_CACHE_DIR, value: /scratch/triton}
              - {name: HF_HOME, value: /models/hub}
            ports:
              - {name: ray-metrics, containerPort: 8080}
              # An engine listens on 30000 plus the number of its first GPU.
              {{- range $gpu := untilStep 0 (int $n.gpus) (int .Values.application.tensorParallel) }}
              - {name: engine-{{ $gpu }}, containerPort: {{ add 30000 $gpu }}}
              {{- end }}
            lifecycle:
              # Upon SIGTERM Ray cuts the streams of the node's engines. This lets Serve end the engines first, streams included.
              preStop:
                exec:
                  command: [python3, -m, deploy.ray.drain, {{ .Values.application.drainSeconds | int | quote }}]
            resources:
              {{- range list "requests" "limits" }}
              {{ . }}: {cpu: {{ int $n.cpu | quote }}, memory: {{ int $n.memoryGiB }}Gi, nvidia.com/gpu: {{ int $n.gpus | quote }}}
              {{- end }}
            volumeMounts:
              - {name: models, mountPath: /models}
              - {name: scratch, mountPath: /scratch}
              - {name: tmp, mountPath: /tmp}
              - {name: shm, mountPath: /dev/shm}
        volumes:
          - {name: models, persistentVolumeClaim: {claimName: {{ .Values.claim | quote }}}}
          - {name: scratch, emptyDir: {sizeLimit: 50Gi}}
          - {name: tmp, emptyDir: {sizeLimit: 50Gi}}
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: {{ int $n.sharedMemoryGiB }}Gi}}
{{- end }}
